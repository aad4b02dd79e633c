"""A conversation coloured by its mask, as HTML and as text."""

import html
import itertools
import re

import numpy as np
from rich.cells import cell_len

from miles.data.encoding.encoder import encode
from miles.data.notebook.preview import Preview, pieces, to_html, to_text
from miles.data.notebook.row import Row

MESSAGES = [
    {"role": "user", "content": "<b>&\x1b[31m</b>"},
    {"role": "assistant", "content": "𠮷 and\nmore"},
]


def trained_text_of(fragment: str) -> str:
    """Return the text on the trained colour, without the legend's own swatch."""
    body = fragment.split("</div>", 1)[1]
    runs = re.findall(r'<span style="background:rgba\(46.*?">(.*?)</span></span>', body, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", "".join(runs)))


def test_tokens_of_one_character_are_joined(chatml_tokenizer) -> None:
    ids = chatml_tokenizer.encode("a𠮷b", add_special_tokens=False)
    assert len(ids) == 6  # four bytes are four tokens
    found = list(pieces(ids, [0, 1, 1, 1, 1, 0], chatml_tokenizer))
    assert [(piece.text, len(piece.token_ids), piece.is_trained) for piece in found] == [
        ("a", 1, False),
        ("𠮷", 4, True),
        ("b", 1, False),
    ]


def test_broken_bytes_are_kept(chatml_tokenizer) -> None:
    broken = chatml_tokenizer.encode("𠮷", add_special_tokens=False)[:2]
    real = chatml_tokenizer.encode("\ufffd", add_special_tokens=False)
    ids = [*broken, *chatml_tokenizer.encode("ab", add_special_tokens=False), *real]
    found = list(pieces(ids, [1] * len(ids), chatml_tokenizer))
    token_ids = [piece.token_ids for piece in found]
    assert list(itertools.chain(*token_ids)) == ids
    text = "".join(piece.text for piece in found)
    assert text.startswith("\ufffd")
    assert "ab" in text
    assert text.endswith("\ufffd")


def test_html(chatml_tokenizer) -> None:
    encoded = encode(MESSAGES, chatml_tokenizer)
    fragment = to_html(encoded, chatml_tokenizer)
    assert trained_text_of(fragment) == "𠮷 and↵\nmore<|im_end|>"
    assert f"{int(encoded.loss_mask.sum())} of {len(encoded.input_ids)} tokens" in fragment
    assert "<b>" not in fragment
    assert "\x1b" not in fragment
    visible = html.unescape(re.sub(r"<[^>]+>", "", fragment.split("</div>", 1)[1]))
    assert visible.startswith("<|im_start|>user↵\n<b>&␛[31m</b><|im_end|>↵\n")
    assert not re.search(r"https?:|<script|<link|<style", fragment)


def test_a_kept_batch_looks_the_same(chatml_tokenizer) -> None:
    encoded = encode(MESSAGES, chatml_tokenizer)
    kept = (encoded.input_ids.tolist(), encoded.loss_mask.tolist())
    assert to_html(kept, chatml_tokenizer) == to_html(encoded, chatml_tokenizer)
    arrays = (encoded.input_ids.astype(np.int64), encoded.loss_mask)
    assert to_text(arrays, chatml_tokenizer) == to_text(encoded, chatml_tokenizer)


def test_text(chatml_tokenizer) -> None:
    text = to_text(encode(MESSAGES, chatml_tokenizer), chatml_tokenizer)
    trained = "".join(
        text.plain[span.start : span.end]
        for span in text.spans
        if getattr(span.style, "bgcolor", None) is not None
    )
    assert trained == "𠮷 and↵\nmore<|im_end|>"
    assert "\x1b" not in text.plain


def test_brackets_mark_what_colours_do_not(chatml_tokenizer) -> None:
    text = to_text(encode(MESSAGES, chatml_tokenizer), chatml_tokenizer, has_colours=False)
    assert "</think>↵\n↵\n[[𠮷 and↵\nmore<|im_end|>]]↵\n" in text.plain
    bracketed = [{"role": "user", "content": "[[1]]"}, MESSAGES[1]]
    text = to_text(encode(bracketed, chatml_tokenizer), chatml_tokenizer, has_colours=False)
    assert "⟦𠮷 and↵\nmore<|im_end|>⟧" in text.plain


def test_no_token_is_broken_at_the_end_of_a_line(chatml_tokenizer) -> None:
    encoded = encode(MESSAGES, chatml_tokenizer)
    whole = to_text(encoded, chatml_tokenizer).plain
    broken = to_text(encoded, chatml_tokenizer, columns=16).plain
    assert broken.replace("\n", "") == whole.replace("\n", "")
    lines = broken.split("\n")
    assert max(cell_len(line) for line in lines) <= 16
    assert broken.count("<|im_end|>") == whole.count("<|im_end|>")
    assert "<|im_start|>\nassistant↵\n" in broken


def test_a_preview_says_how_it_marks(chatml_tokenizer) -> None:
    encoded = encode(MESSAGES, chatml_tokenizer)
    row = Row(7, "chat", "a.jsonl", 7, {}, None, encoded, None, "", chatml_tokenizer)
    text = Preview([row]).to_text()
    assert text.startswith("trained tokens stand in [[ ]]")
    assert "[[𠮷 and↵\nmore<|im_end|>]]" in text
