"""The order of the rows: which rows step k has, as arithmetic on row counts and a seed.

In come the row counts of the manifest and the settings of the order; out come windows and the row
ids of their steps. Rows are shuffled in `shuffle.py`, sources are mixed in `mixture.py`, and
`plan.py` cuts windows and steps. Pure arithmetic: it runs wherever it is needed and reads no file.
May import `miles.common`, `miles.errors`, `miles.data.config` and `miles.data.types`.
"""
