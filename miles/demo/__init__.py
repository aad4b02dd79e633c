"""`miles demo`: the main job from rows to report, on data and a model that ship with the package.

In: an output folder. Out: a whole run in it. It needs no network and no GPU. It runs in the user's
own process and starts a small Ray; it may import every other room but `miles.cli`.

    run                  the job, step by step
    compare              the exported model against the trained one, and an answer
    rows                 the shipped rows, chat.jsonl and code.jsonl
    tokenizer            the rows' text -> a byte-level BPE with Qwen3's special tokens
    chat_template.jinja  ChatML with Qwen3's treatment of reasoning and tools
    model                a tokenizer's folder -> a tiny Qwen3 with seeded random weights
"""
