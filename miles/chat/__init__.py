"""Answers of a trained model: in a terminal (`miles chat`), or for a file (`miles generate`).

In: the folder of a run, of a Hugging Face checkpoint, or of an adapter. Out: answers, as text or as
JSON lines. It runs in the process of the command, by transformers, on a GPU or on the CPU; without
Ray and Megatron. It may import `data`, whose encoder makes the prompts, and `convert`, which makes
a Hugging Face folder of a checkpoint.
"""
