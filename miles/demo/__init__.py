"""The embedded default that `miles demo` runs on: rows, a tokenizer with its chat template, a tiny model.

rows.py             chat.jsonl and code.jsonl: where they lie, how to read them
tokenizer.py        the rows' text -> a byte-level BPE with Qwen3's special tokens
chat_template.jinja ChatML with Qwen3's treatment of reasoning and tools
model.py            a tokenizer's folder -> a tiny Qwen3 with seeded random weights
"""
