"""Launch lines and YAML files -> the settings of a run.

In: the words behind `miles train`. Out: a `TrainConfig`, or a `ConfigError` that names the flag.
It runs in the process of `miles train`; other commands take single flags from here. The flags are
declared on the fields of `miles.train.config` and `miles.data.config`. It may import these and
`miles.common`; it loads neither torch nor Ray, and fsspec only where a file is read.
"""
