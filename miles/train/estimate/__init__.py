"""A run before it is started: what can be known of it, and arithmetic on operations and memory.

In: a configuration. Out: a `Preflight`, an error, numbers, and the text of the dry run. It runs in
the driver, and in `miles train --dry-run`, which needs neither Ray nor a GPU. It may import
`miles.train.config`, `types` and `parallel_layout`, `miles.data.stream`, `miles.convert`,
`miles.architecture` and `miles.common`.

    flops          operations of a step, the peak of a GPU
    memory         bytes on each rank of a pipeline stage
    host_memory    bytes of the machine's own memory
    gpu_fit        the GPUs on which that fits
    place_checks   the folders that are written, the packages of sinks
    preflight      all checks before a start, of `train` and `--dry-run` alike
    dry_run        what they found, as text
"""
