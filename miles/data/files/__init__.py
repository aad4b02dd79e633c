"""Files -> rows: the files of a source, where their rows lie, and the bytes of single rows.

In come paths and globs (fsspec URLs); out come a `Manifest`, and rows as JSON text by row id. The
manifest is built in the driver, rows are read in the loaders' tasks. Start with `manifest.py`, then
`read.py`. May import `miles.common`, `miles.errors`, `miles.data.config` and `miles.data.types`.
"""
