"""Mistakes in the lines of `miles chat`, `generate` and `compare`, as those of `mistakes.py`."""

from __future__ import annotations

from tests.support.mistakes import INPUT, RUN, USAGE, Mistake

ANSWERS = (
    Mistake("chat {none}", INPUT, "no such folder; expected the folder of a run"),
    Mistake("chat {file}", INPUT, "a file, not a folder; expected the folder of a run"),
    Mistake("chat {empty}", INPUT, "neither a run (latest_checkpointed_iteration.txt"),
    Mistake("chat {tokenizer}", INPUT, "neither a run (latest_checkpointed_iteration.txt"),
    Mistake("chat {empty_word}", USAGE, "argument RUN|EXPORT: it is empty"),
    Mistake("chat s3://bucket/x", INPUT, "no credentials were found"),
    Mistake("chat {config_broken}", INPUT, "config.json: not JSON"),
    Mistake("chat {config_list}", INPUT, "config.json: a JSON object was expected; found list"),
    Mistake("chat {config_latin}", INPUT, "config.json: not UTF-8 text"),
    Mistake("chat {peft}", USAGE, "give --hf-checkpoint, the folder of the model below the"),
    Mistake("chat {lora_run} --hf-checkpoint {hf}", INPUT, "lora_run"),
    Mistake("chat {broken_run}", USAGE, "its config.json is not there (it lies in --output"),
    Mistake("chat {config_absurd}", INPUT, "num_layers would be 1000000000"),
    Mistake("chat {cut_weights}", INPUT, "not a safetensors file: "),
    Mistake("chat {tracker_text}", INPUT, "expected an iteration or 'release'"),
    Mistake("chat {tracker_gone}", INPUT, "iter_0000007, which is not there"),
    Mistake("chat {hf} --ckpt-step 5", USAGE, "is no run, and has no steps: leave it out"),
    Mistake("chat {hf} --top-p 0.9", USAGE, "--top-p has no effect at --temperature 0"),
    Mistake("chat {hf} --temperature nan", USAGE, "--temperature must be a finite number, not nan"),
    Mistake("chat {hf} --max-new-tokens 0", USAGE, "--max-new-tokens must be positive, not 0"),
    Mistake("chat {hf} --temprature 1", USAGE, "did you mean --temperature?"),
    Mistake("generate {hf} --output {out}", USAGE, "--prompts is missing"),
    Mistake("generate {hf} --output {out} --prompts {none}.jsonl", INPUT, "no such file"),
    Mistake("generate {hf} --output {out} --prompts {no_rows}", INPUT, "has no row"),
    Mistake("generate {hf} --output {out} --prompts {prose}", INPUT, "not JSON (Expecting value)"),
    Mistake("generate {none} --output {out} --prompts {rows}", INPUT, "none: no such folder"),
    Mistake("generate {hf} --output {file}/x --prompts {rows}", RUN, "is not a folder. Name anoth"),
    Mistake("compare {broken_run}", USAGE, "1 run: give from two to 26"),
    Mistake("compare {none} {out}", INPUT, "metrics.jsonl: no such file; expected the folder of a"),
    Mistake("compare {file} {out}", INPUT, "a file, not a folder; expected the folder of a run"),
    Mistake("compare {broken_run} {broken_run}", INPUT, "metrics.jsonl: no line of it can be read"),
    Mistake("compare s3://bucket/x {out}", INPUT, "no credentials were found"),
    Mistake("compare {empty_word} {out}", USAGE, "argument RUN: it is empty"),
)
