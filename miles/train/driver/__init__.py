"""The driver: starts a run's processes, trains step by step, evaluates, saves and restarts.

In: a `TrainConfig`. Out: a `RunSummary`, checkpoints, and the files of the run folder.
It runs in the process of `miles train`; `loop.train` is the way in.
It may import every other room of `miles.train`, and is the only one that may call `miles.convert`.
Importing it imports neither torch nor Megatron.
"""
