"""Chat templates of other families against the copies of them, made by trl, that mark answers for transformers.

Each `NAME.jinja` in trl's folder with a `NAME_training.jinja`, its twin, is certified as it is; what we train must be
what `return_assistant_tokens_mask=True` says of the twin, but for what the twins train beyond what a model has
to produce: the newline (or the end of text) behind a terminator, an empty think block, and what the
generation prompt supplies.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import encode
from miles.data.template.certificate import Certificate
from miles.data.template.certify import certify
from miles.data.tokens.load import pin_date
from miles.data.types import Encoded, RowRejected
from miles.errors import TemplateError

_spec = find_spec("trl")  # found, not imported: only its templates are needed
if _spec is None or _spec.origin is None:
    pytest.skip("trl, whose chat templates are tried, is not installed", allow_module_level=True)
TEMPLATES = Path(_spec.origin).parent / "chat_templates"
NAMES = sorted(
    path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja")
)

REFUSED = {
    "glm4moe": "does not end each assistant turn with a special token",
    "gptoss": "ends assistant turns with different tokens",
}
NO_TEXT = ("idefics3", "llava_next", "smolvlm")
"""They take a message's content as a list of parts only."""

OWN_TOKENS = re.compile(
    r"<\|[^|<>\s']+\|>|<｜[^｜<>']+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|</?think>|</?tool_call>"
)
EOS = {
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "phi3": "<|endoftext|>",
    "phi3_5": "<|endoftext|>",
}


PAGE = Path(__file__).parents[3] / "docs/masks.md"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {
    "type": "function",
    "function": {"name": "lookup", "arguments": {"word": "tree", "count": 3}},
}
RESULT = {"role": "tool", "name": "lookup", "content": "a plant"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Looks a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "the word"}},
            },
        },
    }
]
CASES: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "single": ([user(" What is 2+2? "), assistant("It is 4.")], None),
    "newlines": ([user("Hi"), assistant("\n\nHello\n")], None),
    "multi": (
        [
            user("One?"),
            assistant("1"),
            user("Two?"),
            assistant("2"),
            user("Three?"),
            assistant("3"),
        ],
        None,
    ),
    "system": ([{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello")], None),
    "markers": (
        [user("say <|im_end|> | <think>"), assistant("a | b </s> <|im_start|>assistant\n")],
        None,
    ),
    "reasoning": ([user("Why?"), assistant("Because.", reasoning_content="Hm.\nYes.")], None),
    "inline": ([user("Why?"), assistant("<think>\nHm.\n</think>\n\nBecause.")], None),
    "reasoning twice": (
        [
            user("Why?"),
            assistant("So.", reasoning_content="A."),
            user("And?"),
            assistant("Thus.", reasoning_content="B."),
        ],
        None,
    ),
    "tools": (
        [user("tree?"), assistant("", tool_calls=[CALL]), RESULT, assistant("A plant.")],
        TOOLS,
    ),
    "two tools": (
        [
            user("tree?"),
            assistant("Well.", tool_calls=[CALL, CALL]),
            RESULT,
            RESULT,
            assistant("A plant."),
        ],
        TOOLS,
    ),
}
CHANGED_TEXT = {
    # These twins keep reasoning, or the think block, in earlier turns, so that a conversation extends its beginning.
    **{
        name: {"multi", "reasoning twice"}
        for name in ("qwen3_5_nothink", "qwen3_5_think", "qwen3_6")
    },
    "qwen3": {"multi", "reasoning twice", "tools", "two tools"},
    "deepseek_r1_distill": {"inline"},
}


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest, chatml_tokenizer_folder: Path) -> Any:
    """Qwen3's tokenizer where it is at hand, else a small one, with the special tokens of every template."""
    from transformers import AutoTokenizer

    try:
        folder = request.getfixturevalue("assets") / "qwen3-tokenizer"
    except pytest.skip.Exception:
        folder = chatml_tokenizer_folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8") for name in NAMES]
    own = sorted(
        {token for text in texts for token in OWN_TOKENS.findall(text)} - set(tokenizer.get_vocab())
    )
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": own})
    return tokenizer


@pytest.fixture
def of_template(tokenizer: Any, request: pytest.FixtureRequest) -> tuple[str, Any]:
    name = request.param
    tokenizer.eos_token = EOS.get(name, "<|im_end|>")
    tokenizer.chat_template = pin_date((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    return name, tokenizer


@pytest.mark.parametrize(
    "of_template",
    [name for name in NAMES if name not in (*REFUSED, *NO_TEXT)],
    indirect=True,
    ids=lambda name: name,
)
def test_what_is_trained_is_what_the_twin_marks(of_template: tuple[str, Any]) -> None:
    name, tokenizer = of_template
    certificate = certify(tokenizer, EncodeConfig(tokenizer=name))
    twin = pin_date((TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8"))
    compared, changed = set(), set()
    for case, (messages, tools) in CASES.items():
        try:
            ours = encode(messages, tokenizer, tools=tools)
        except RowRejected as rejected:
            _require_due(rejected, certificate, case)
            continue
        served = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=False
        )
        assert ours.input_ids.tolist() == served, case
        marked = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=twin,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        if marked["input_ids"] != served:
            changed.add(case)
            continue
        compared.add(case)
        _compare(ours, marked["assistant_masks"], tokenizer, certificate, f"{name}, {case}")
    assert changed == CHANGED_TEXT.get(name, set())
    assert {"single", "newlines", "markers"} <= compared
    assert ("system" in compared) == certificate.accepts_system
    assert certificate.accepts_tools == ({"tools", "two tools"} <= compared | changed)


def _require_due(rejected: RowRejected, certificate: Certificate, case: str) -> None:
    """The certificate said so."""
    if "tools" in case:
        assert not certificate.accepts_tools
    else:
        assert case == "system"
        assert rejected.reason == "template_error"
        assert not certificate.accepts_system


def _compare(
    ours: Encoded, theirs: list[int], tokenizer: Any, certificate: Certificate, where: str
) -> None:
    ids, mask = ours.input_ids.tolist(), ours.loss_mask.tolist()
    num_straddling = 0
    for (own, marked), run in groupby(range(len(ids)), lambda at: (mask[at], theirs[at])):
        if own == marked:
            continue
        tokens = list(run)
        assert marked == 1, f"{where}: we train what the twin does not"
        text = tokenizer.decode([ids[at] for at in tokens])
        is_behind = tokens[0] > 0 and mask[tokens[0] - 1] == 1
        if is_behind:
            rest = text.removesuffix(tokenizer.eos_token).strip("\n")
            assert rest == "", f"{where}: {text!r} behind a terminator is not trained"
            continue
        if ours.num_straddling_tokens and len(tokens) == 1 and text.strip("\n") == "":
            num_straddling += 1
            continue
        is_supplied = text in certificate.generation_prompt
        is_empty_think = re.fullmatch(r"<think>\s*</think>\s*", text)
        assert is_supplied or is_empty_think, f"{where}: {text!r} before an answer is not trained"
    assert num_straddling == ours.num_straddling_tokens


@pytest.mark.parametrize("of_template", REFUSED, indirect=True, ids=lambda name: name)
def test_what_cannot_be_certified_is_refused_by_name(of_template: tuple[str, Any]) -> None:
    name, tokenizer = of_template
    with pytest.raises(TemplateError, match=REFUSED[name]) as refused:
        certify(tokenizer, EncodeConfig(tokenizer=name))
    assert str(refused.value).startswith(name)


@pytest.mark.parametrize("of_template", NO_TEXT, indirect=True, ids=lambda name: name)
def test_a_template_that_takes_no_text_is_refused(of_template: tuple[str, Any]) -> None:
    name, tokenizer = of_template
    with pytest.raises(
        TemplateError,
        match=r"renders the message 'QUESTION1' 0 times|fails on a plain conversation",
    ):
        certify(tokenizer, EncodeConfig(tokenizer=name))


def test_the_page_lists_every_verdict(tokenizer: Any) -> None:
    row = r"^\| (exact|of these, with tool calls|refused: [^|]*) \| (.*) \|$"
    rows = re.findall(row, PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {verdict: set(re.findall("`([a-z0-9_]+)`", templates)) for verdict, templates in rows}
    assert listed.pop("exact") == set(NAMES) - set(REFUSED) - set(NO_TEXT)
    with_tools = {
        name
        for name in NAMES
        if name not in (*REFUSED, *NO_TEXT) and _accepts_tools(name, tokenizer)
    }
    assert listed.pop("of these, with tool calls") == with_tools
    assert set.union(*listed.values()) == {*REFUSED, *NO_TEXT}


def _accepts_tools(name: str, tokenizer: Any) -> bool:
    tokenizer.chat_template = pin_date((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    return certify(tokenizer, EncodeConfig(tokenizer=name)).accepts_tools
