"""The shipped rows: well-formed, varied, true where that can be checked; four are broken."""

from __future__ import annotations

import ast
import json
import re
import sqlite3
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from miles.data.types import REJECT_REASONS
from miles.demo import rows

ROLES = {"system", "human", "gpt"}

COLUMNS = (
    "custom_instruction",
    "topic",
    "model_name",
    "model",
    "skip_prompt_formatting",
    "category",
    "conversations",
    "views",
    "language",
    "id",
    "title",
    "idx",
    "hash",
    "avatarUrl",
    "system_prompt",
    "source",
)
"""OpenHermes-2.5's columns, in its order."""


@pytest.fixture(scope="module")
def usable() -> list[dict]:
    usable = []
    for name in rows.FILES:
        for number, line in enumerate(rows.lines(name)):
            if (name, number) not in rows.BROKEN:
                usable.append(json.loads(line))
    return usable


def answers(row: dict) -> list[str]:
    return [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]


def test_files_are_large_enough(usable):
    assert len(rows.lines("chat")) >= 300
    assert len(rows.lines("code")) >= 200
    assert len(usable) >= 520
    assert Counter(row["source"] for row in usable)["miles-demo-written"] >= 150


def test_every_row_has_the_columns_of_openhermes(usable):
    for row in usable:
        assert tuple(row) == COLUMNS
        assert row["id"]
        assert row["category"]
        assert row["source"] in ("miles-demo-written", "miles-demo-templated")
        for turn in row["conversations"]:
            assert tuple(turn) == ("from", "value", "weight")
            assert turn["weight"] is None


def test_conversations_are_well_formed(usable):
    for row in usable:
        roles = [turn["from"] for turn in row["conversations"]]
        talk = roles[1:] if roles[0] == "system" else roles
        assert len(talk) >= 2
        assert talk == ["human", "gpt"] * (len(talk) // 2), row["id"]
        assert not (roles[0] == "system" and row["system_prompt"]), row["id"]
        for turn in row["conversations"]:
            assert turn["value"], row["id"]
            assert turn["value"] == turn["value"].strip(), row["id"]


def test_variety(usable):
    assert sum(len(answers(row)) > 1 for row in usable) >= 60
    assert sum(row["language"] != "en" for row in usable) >= 60
    assert {"de", "fr", "es", "zh", "ja", "hi", "ar", "ru", "pt"} <= {
        row["language"] for row in usable
    }
    with_turn = sum(row["conversations"][0]["from"] == "system" for row in usable)
    with_column = sum(bool(row["system_prompt"]) for row in usable)
    assert with_turn >= 40
    assert with_column >= 20
    assert with_turn + with_column >= 80
    assert sum("```" in "".join(answers(row)) for row in usable) >= 100


def test_answers_are_short_but_not_bare(usable):
    lengths = []
    for row in usable:
        if row["language"] == "en":
            lengths += [len(answer.split()) for answer in answers(row)]
    lengths.sort()
    assert lengths[-1] <= 80
    assert lengths[len(lengths) // 2] >= 15


def test_no_two_rows_are_the_same(usable):
    conversations = Counter[str]()
    questions = Counter[str]()
    for row in usable:
        turns = row["conversations"]
        texts = [turn["value"].lower() for turn in turns]
        conversations[json.dumps([row["system_prompt"], texts])] += 1
        asked = [turn["value"].lower() for turn in turns[:3] if turn["from"] != "gpt"]
        questions[json.dumps([row["system_prompt"], *asked])] += 1

    assert [text for text, count in conversations.items() if count > 1] == []
    assert [text for text, count in questions.items() if count > 1] == []
    assert len({row["id"] for row in usable}) == len(usable)


def test_text_is_in_normal_form_c(usable):
    # else the tokenizer's normalizer would change it, and decoding would not give the row back
    for row in usable:
        for turn in row["conversations"]:
            assert unicodedata.is_normalized("NFC", turn["value"]), row["id"]


def test_python_in_answers_parses(usable):
    blocks = []
    for row in usable:
        for answer in answers(row):
            found = re.findall(r"```python\n(.*?)```", answer, re.DOTALL)
            blocks += [(row["id"], block) for block in found]
    assert len(blocks) >= 50
    for row_id, block in blocks:
        try:
            ast.parse(block)
        except SyntaxError as error:
            pytest.fail(f"{row_id}: {error}")


def test_python_outputs_are_true(usable):
    checked = 0
    for row in usable:
        if row["category"] == "python-output":
            question, answer = (turn["value"] for turn in row["conversations"][-2:])
            expression = re.search(r"`(.*)`", question)[1]
            claimed = re.match(r"`(.*?)`\. ", answer)[1]
            printed = re.fullmatch(r"print\((.*)\)", expression)
            value = eval(printed[1] if printed else expression)  # noqa: S307  (our own rows)
            assert claimed == (str(value) if printed else repr(value)), row["id"]
            checked += 1
    assert checked >= 25


def test_sums_are_true(usable):
    def number(text: str) -> float:
        return float(text.replace(",", ""))

    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "×": lambda a, b: a * b,
        "÷": lambda a, b: a / b,
        "/": lambda a, b: a / b,
    }
    pattern = r"(?<![\d+×÷/-] )(?<![\d.,])(\d[\d.,]*) ([-+×÷/]) (\d[\d.,]*) = (\d[\d,]*(?:\.\d+)?)"
    checked = 0
    for row in usable:
        if row["category"] in ("arithmetic", "reasoning"):
            for a, sign, b, result in re.findall(pattern, " ".join(answers(row))):
                expected = pytest.approx(operations[sign](number(a), number(b)))
                assert number(result) == expected, (row["id"], a, sign, b)
                checked += 1
    assert checked >= 30


def test_shop_queries_run(usable):
    shop = sqlite3.connect(":memory:")
    shop.executescript(
        "CREATE TABLE customers(id, name, city); CREATE TABLE products(id, name, price);"
        "CREATE TABLE orders(id, customer_id, product_id, amount)"
    )

    queries = [
        re.search(r"```sql\n(.*?)```", answers(row)[0], re.DOTALL)[1]
        for row in usable
        if "customers(id, name, city)" in (row["system_prompt"] or "")
    ]
    assert len(queries) >= 10
    for query in queries:
        shop.execute(query)


class TestBroken:
    def row(self, reason: str) -> str:
        (where,) = (where for where, why in rows.BROKEN.items() if why == reason)
        return rows.lines(where[0])[where[1]]

    def test_few_rows_are_broken_none_early(self):
        assert len(rows.BROKEN) == 4
        assert set(rows.BROKEN.values()) <= set(REJECT_REASONS)
        assert len(rows.BROKEN) <= 0.01 * sum(len(rows.lines(name)) for name in rows.FILES)
        for _, number in rows.BROKEN:
            assert number >= 50

    def test_malformed_json(self):
        with pytest.raises(json.JSONDecodeError):
            json.loads(self.row("malformed_json"))

    def test_empty_conversation(self):
        assert json.loads(self.row("no_messages"))["conversations"] == []

    def test_unknown_role(self):
        roles = {turn["from"] for turn in json.loads(self.row("unknown_role"))["conversations"]}
        assert roles - ROLES == {"narrator"}

    def test_null_value(self):
        values = [turn["value"] for turn in json.loads(self.row("bad_message"))["conversations"]]
        assert values[-1] is None

    def test_no_other_row_is_broken(self, usable):
        roles = set()
        for row in usable:
            roles |= {turn["from"] for turn in row["conversations"]}
        assert roles == ROLES


def test_texts_are_those_of_the_usable_rows(usable):
    found = list(rows.texts())
    assert all(isinstance(text, str) for text in found)
    assert len(found) == sum(
        len(row["conversations"]) + bool(row["system_prompt"]) for row in usable
    )
    assert not any("The moon rose." in text for text in found)


def test_copies_are_the_same_bytes(tmp_path: Path):
    copies = rows.copy_rows(tmp_path / "new" / "folder")
    assert {name: copy.name for name, copy in copies.items()} == rows.FILES
    for name, copy in copies.items():
        assert copy.read_bytes() == rows.paths()[name].read_bytes()
