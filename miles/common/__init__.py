"""Tools that every room uses: files and object storage, leases, retries, secrets, Ray, checkpoints.

Comes in: URLs, texts, calls that may fail for a moment. Goes out: bytes, files, errors that name
the file. Runs in every process. May import only `errors` from miles. It knows no Megatron, and
torch in `safe_pickle` alone.
"""
