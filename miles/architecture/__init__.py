"""The architecture of a model: its sizes, and the Hugging Face tensors of each Megatron tensor.

Comes in: the content of a `config.json`. Goes out: a `ModelShape`, counts of its parameters, and
its parameter map. Runs in every process, as plain records: no weights, no Megatron, no torch at
import. May import `common` and `errors`. `convert` and `train` both build on it, so that the two
cannot disagree about what a configuration means. Each model family is one file in `families/`.
"""
