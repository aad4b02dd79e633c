"""The walk through `miles/data/template/README.md` shows what the code gives."""

import doctest
import re
from pathlib import Path
from typing import Any

import miles.data.template

README = Path(miles.data.template.__file__).parent / "README.md"
FENCE = re.compile(r"^```.*$", re.MULTILINE)


def test_the_examples_give_what_they_show(chatml_tokenizer: Any) -> None:
    text = README.read_text(encoding="utf-8")
    chatml_tokenizer.chat_template = template_of(text)
    # A fence would be taken for the last line of an example's output.
    parsed = doctest.DocTestParser().get_doctest(
        FENCE.sub("", text), {"tokenizer": chatml_tokenizer}, README.name, str(README), 0
    )
    assert len(parsed.examples) > 40
    results = doctest.DocTestRunner().run(parsed)
    assert results.failed == 0


def test_the_template_has_ten_lines() -> None:
    assert len(template_of(README.read_text(encoding="utf-8")).splitlines()) == 10


def template_of(text: str) -> str:
    found = re.search(r"```jinja\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found.group(1)
