"""Conversations become token ids and loss masks.

In: a normalized conversation, a tokenizer with its chat template, the settings of `EncodeConfig`.
Out: an `Encoded` (ids and mask), or `RowRejected` with the reason; for many rows, `EncodedRows`.
The mask is decided in `loss_mask.py`; `encoder.py` leads a row there, and `step_encoder.py` the
rows of a step together; `escape.py` is for rows that spell control tokens. An encoder is certified
once (`kept_encoders.py`) and travels as data (`carried_state.py`). Runs in the loader processes,
and in a notebook through `miles.data.encode`.
May import `template`, `tokens`, `data.types` and `data.config`; nothing of Ray.
"""
