"""Recipes: each module has a function that returns a complete configuration, and runs as a script.

    recipe             what they share: the words of a launch line, the flags of a script, the start
    run_qwen3_sft      all weights of Qwen3, with 4 or with 235 billion parameters
    lora_qwen3_4b      adapters beside the frozen weights of Qwen3-4B-Base
    mixture            several data sets by weight, with the loss of each
    openhermes_qwen3   the run of the README

A recipe is a line of `miles train`, so docs/flags.md says what its words mean. It may import the
records of the configuration, the launch line and the command; nothing in `miles` imports a recipe.
"""
