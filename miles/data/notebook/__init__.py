"""The data set that `miles.data.prepare` returns: to look at, to write as messages, to train on.

In: the settings of rows and of encoding, as `miles train` takes them.
Out: a card of numbers, previews coloured by the mask, Parquet files, steps.
It runs in a notebook or in `miles prepare`. Where rows are many, it joins or starts Ray there, and
loaders work for it. It may import every room of the data path; none of them imports it.
"""
