"""Text -> token ids: tokenizers as they are loaded, and the fastest way that gives the same ids.

In come the name of a Hugging Face tokenizer (`load.py`) and texts (`text_encoder.py`); out come ids,
and the token at each character. Texts go through tiktoken where `bpe_proof.py` proves that exact
(`bpe.py`). Runs in the driver when a tokenizer is certified, and in the loaders' tasks, which get
it as data, without transformers (`carried_tokenizer.py`).
May import `miles.common`, `miles.errors`, `miles.data.config` and `miles.data.types`.
"""
