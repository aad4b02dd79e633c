"""Checkpoints between Hugging Face and Megatron's `torch_dist`, both ways, exact.

Comes in: a folder of either format (fsspec URL). Goes out: a folder of the other, which appears
when it is complete, the differences between two, or a rank's part of a Hugging Face folder. Runs in
the process that calls it (`miles convert`, a rank, the driver's export), in threads. Tensors go by
name through a family's parameter map; no model is built, no Megatron is started. May import
`architecture`, `common` and `errors`.
"""
