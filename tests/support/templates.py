"""Templates on small rows, traced by us and rendered by transformers."""

from __future__ import annotations

from typing import Any

from miles.data.template.anchors import Anchors
from miles.data.template.render import Renderer
from miles.data.template.trace import Tracer

WORDS = (
    *("", "x", "a b", "A,b,,C", " \n pad\n", "{}", "%s", "\\", "real", "count", "0", "#" * 300),
    *("</think>\n\nq", "one</think>two</think>three", "Straße <b> & 'q' \"z\""),
    *("\ufdd00\ufdd1", "\ud800", "\0", "e\u0301é\u2028法👩‍👩‍👧"),
)
"""Contents of messages: each a row, or each two of them."""


def of_contents(template: str) -> str:
    """Return a template with $C and $D for the contents of the first two messages."""
    return template.replace("$C", "messages[0].content").replace("$D", "messages[1].content")


def row(*contents: Any) -> list[dict[str, Any]]:
    """Return messages with these contents, of a user and an assistant in turn."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(contents)
    ]


def tracer_of(template: str, **variables: Any) -> Tracer:
    return Tracer(template, variables, reserved="<|>")


def renderer_of(tokenizer: Any, template: str) -> Renderer:
    """Return a renderer with anchors that the template need not have."""
    tokenizer.chat_template = template
    return Renderer(tokenizer, {}, Anchors("<|im_start|>a\n", "<|im_start|>a\n", "<|im_end|>", ()))


def traced(tracer: Tracer, messages: list[dict[str, Any]], tools: Any = None) -> str:
    """Return the text of a row, from its program."""
    program, strings = tracer.program(messages, tools)
    return "".join(program.run(strings))


def served(tokenizer: Any, template: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    """Return the text of a row, from transformers."""
    return tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False
    )
