"""What `miles.data.prepare` returns: a data set to look at, to write as messages, or to feed to a trainer.

In: the settings of rows and of encoding, as `miles train` takes them. Out: a card of numbers, previews coloured by the
mask, Parquet files, steps. It runs in a notebook or in `miles prepare`, and joins or starts Ray there. It may import
every room of the data path; nothing of the data path imports it.
"""
