"""The settings of the data path refuse what cannot be used, in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.errors import ConfigError


@pytest.mark.parametrize(
    ("kwargs", "found"),
    [
        ({"x": {1: 2, "a": 3}}, "whose keys are text, not 1"),
        ({"x": [{None: 2}]}, "whose keys are text, not None"),
        ({"x": {1, 2}}, "Object of type set"),
    ],
)
def test_template_kwargs_are_json(kwargs: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        EncodeConfig("tokenizer", template_kwargs=kwargs)
