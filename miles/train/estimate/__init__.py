"""Arithmetic on a run before it is started: operations, memory, and the report of `--dry-run`.

In: a configuration, a model's shape, a layout. Out: numbers, and the text of the dry run. It runs
in the driver, and in `miles train --dry-run`, which needs neither Ray nor a GPU. It may import
`miles.train.config`, `types` and `parallel_layout`, `miles.data.stream`, `miles.convert`,
`miles.architecture` and `miles.common`.

    flops     operations of a step, the peak of a GPU
    memory    bytes on each rank of a pipeline stage
    dry_run   everything that can be known of a run without starting it
"""
