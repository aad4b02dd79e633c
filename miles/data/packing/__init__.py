"""Packing: a step's samples -> micro-batches of bounded size, as many on every data-parallel rank.

In come sample lengths, then packed steps as Arrow tables; out come micro-batches by rank (`pack`),
the chunk that each node gets (`shards`), and arrays with shifted labels (`micro_batch`). `pack`
runs in the loaders' tasks, `shards` in the feed and the trainers. May import `miles.common`,
`miles.errors`, `miles.data.config` and `miles.data.types`.
"""
