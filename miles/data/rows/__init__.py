"""Rows -> conversations: one format for all row shapes, or a reason why a row cannot be used.

In comes a row as JSON text and the format of its source; out comes a `Conversation`, or a
`RowRejected` (`normalize.py`). `messages_parquet.py` writes conversations as rows again. Both run
in the loaders' tasks. May import `row_columns`, `turn_values` and `media_columns` of
`miles.data.files`, `miles.data.config`, `miles.data.types`, `miles.common` and `miles.errors`.
"""
