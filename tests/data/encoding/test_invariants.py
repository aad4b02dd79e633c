"""The two promises of the data side, for templates and rows of all kinds.

(a) The ids are those of the served render. (b) The trained tokens decode to the rendered answers
and their terminators, less the tokens that straddle the start of one, which are counted.

Templates are composed of fragments: Jinja, and the same in Python, so that the expected answers do
not come from Jinja.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from miles.data.template.certify import certify
from miles.data.types import Conversation
from miles.errors import TemplateError
from tests.support.conversations import trained_runs

Message = dict[str, Any]


@dataclass(frozen=True)
class Fragment:
    """Jinja that renders an assistant's message `m` in a loop over all, and the same in Python."""

    jinja: str
    python: Callable[[Message, int, int], str]
    """of the message, its number, and how many there are"""


def _shouted(content: str) -> str:
    return content.upper() if "loud" in content else content


def _without_thought(content: str) -> str:
    return content.split("</think>")[-1].lstrip("\n")


def _halves(content: str) -> str:
    return "; ".join(part.strip() for part in content.split(";", 2))


ANSWERS = (
    Fragment("m.content", lambda m, n, total: m["content"]),
    Fragment("m.content | trim", lambda m, n, total: m["content"].strip()),
    Fragment("m.content.rstrip('\\n')", lambda m, n, total: m["content"].rstrip("\n")),
    Fragment(
        "m.content.split('</think>')[-1].lstrip('\\n')",
        lambda m, n, total: _without_thought(m["content"]),
    ),
    Fragment("m.content.replace('\\n', ' ')", lambda m, n, total: m["content"].replace("\n", " ")),
    Fragment(
        "(m.content | upper if 'loud' in m.content else m.content)",
        lambda m, n, total: _shouted(m["content"]),
    ),
    Fragment("m.content[:99]", lambda m, n, total: m["content"][:99]),
    Fragment("('! ' ~ m.content)", lambda m, n, total: "! " + m["content"]),
    Fragment(
        "('=' ~ loop.index ~ ' ' ~ m.content)", lambda m, n, total: f"={n + 1} {m['content']}"
    ),
    Fragment(
        "(m.content if m.content.startswith('a') else '- ' ~ m.content)",
        lambda m, n, total: m["content"] if m["content"].startswith("a") else "- " + m["content"],
    ),
    Fragment(
        "(m.content if m.content | length > 3 else '(' ~ m.content ~ ')')",
        lambda m, n, total: m["content"] if len(m["content"]) > 3 else f"({m['content']})",
    ),
    Fragment(
        "(m.content | trim if loop.last else m.content)",
        lambda m, n, total: m["content"].strip() if n == total - 1 else m["content"],
    ),
    Fragment(
        "(m.content.split(';', 2) | map('trim') | join('; '))",
        lambda m, n, total: _halves(m["content"]),
    ),
    Fragment("(m.content or 'nothing')", lambda m, n, total: m["content"] or "nothing"),
)
THOUGHTS = (
    Fragment("''", lambda m, n, total: ""),
    Fragment(
        "('<think>\\n\\n</think>\\n\\n' if loop.last else '')",
        lambda m, n, total: "<think>\n\n</think>\n\n" if n == total - 1 else "",
    ),
    Fragment(
        "('<think>\\n' ~ m.reasoning_content | trim ~ '\\n</think>\\n\\n'"
        " if m.reasoning_content else '')",
        lambda m, n, total: (
            f"<think>\n{m['reasoning_content'].strip()}\n</think>\n\n"
            if m.get("reasoning_content")
            else ""
        ),
    ),
    Fragment(
        "('[why] ' ~ m.reasoning_content ~ '\\n'"
        " if m.reasoning_content is string and loop.last else '')",
        lambda m, n, total: (
            f"[why] {m['reasoning_content']}\n"
            if m.get("reasoning_content") is not None and n == total - 1
            else ""
        ),
    ),
)
HEADERS = ("<|im_start|>{}\n", "<|im_start|>{}", "### {}:\n", "<{}>", "\n\n{}: ")
TERMINATORS = ("<|im_end|>", "<|endoftext|>", "<|im_end|><|endoftext|>")
AFTER = ("\n", "", "\n\n", " ")


@dataclass(frozen=True)
class Template:
    header: str
    terminator: str
    after: str
    bos: str
    is_system_merged: bool
    thought: Fragment
    answer: Fragment

    def jinja(self) -> str:
        before, after = (part.replace("\n", "\\n") for part in self.header.split("{}"))
        end = f"{self.terminator}{self.after}".replace("\n", "\\n")
        says = f"{self.thought.jinja} ~ {self.answer.jinja}"

        skip_system = merge_system = end_skip = ""
        if self.is_system_merged:
            skip_system = "{% if not (loop.first and m.role == 'system') %}"
            merge_system = (
                "{% if m.role == 'user' and loop.index0 == 1 and messages[0].role == 'system' %}"
                "{{ messages[0].content ~ '\\n' }}{% endif %}"
            )
            end_skip = "{% endif %}"

        return (
            f"{{{{ '{self.bos}' }}}}{{% for m in messages %}}{skip_system}"
            f"{{{{ '{before}' ~ m.role ~ '{after}' }}}}{merge_system}"
            f"{{% if m.role == 'assistant' %}}{{{{ {says} }}}}"
            f"{{% else %}}{{{{ m.content }}}}{{% endif %}}{{{{ '{end}' }}}}{end_skip}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ '{before}assistant{after}' }}}}{{% endif %}}"
        )

    def answers(self, messages: list[Message]) -> list[str]:
        """Return the text of each assistant turn, with its terminator."""
        total = len(messages)
        return [
            self.thought.python(m, n, total) + self.answer.python(m, n, total) + self.terminator
            for n, m in enumerate(messages)
            if m["role"] == "assistant"
        ]


PIECES = (
    *(
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "<|endoftext|>",
        "### assistant:\n",
        "<assistant>",
        "\n\nassistant: ",
    ),
    *(
        "<think>",
        "</think>",
        "<think>\n\n</think>\n\n",
        ";",
        "|",
        "[why] ",
        "<",
        "=1 ",
        "- ",
        "###",
    ),
    *(
        "\n",
        "\n\n",
        " ",
        "loud",
        "a",
        " the",
        "word",
        "4",
        "é",
        "e\u0301",
        "a\u0323\u0307",
        "\u0301",
        "法",
        "👩‍👩‍👧",
    ),
)
contents = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=5).map("".join)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": contents},
    optional={"reasoning_content": st.none() | contents},
)
questions = st.fixed_dictionaries({"role": st.just("user"), "content": contents})
systems = st.lists(
    st.fixed_dictionaries({"role": st.just("system"), "content": contents}), max_size=1
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    pairs = draw(st.lists(st.tuples(questions, answers), min_size=1, max_size=3))
    return [*draw(systems), *(message for pair in pairs for message in pair)]


templates = st.builds(
    Template,
    header=st.sampled_from(HEADERS),
    terminator=st.sampled_from(TERMINATORS),
    after=st.sampled_from(AFTER),
    bos=st.sampled_from(["", "<|endoftext|>", "# "]),
    is_system_merged=st.booleans(),
    thought=st.sampled_from(THOUGHTS),
    answer=st.sampled_from(ANSWERS),
)


def normal(tokenizer: Any, text: str) -> str:
    """Return a text as the tokenizer reads it: composed, between the added tokens."""
    added = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
    composed = tokenizer.backend_tokenizer.normalizer.normalize_str
    return "".join(
        composed(piece) if number % 2 == 0 else piece
        for number, piece in enumerate(re.split(f"({added})", text))
    )


def check(encoder: Encoder, messages: list[Message], answers: list[str]) -> None:
    tokenizer = encoder.tokenizer
    encoded = encoder.encode(Conversation(tuple(messages), None, (None,) * len(messages)))
    ids = encoded.input_ids.tolist()
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)

    runs = trained_runs(encoded)
    assert len(runs) == len(answers)
    num_straddling = 0
    for (begin, end), answer in zip(runs, answers, strict=True):
        for think in encoder.certificate.empty_thinks:  # masked, whoever wrote it
            if answer.startswith(think):
                answer = answer.removeprefix(think)
                break

        expected = normal(tokenizer, answer)
        trained = tokenizer.decode(ids[begin:end])
        if trained != expected:
            assert expected.endswith(trained)
            missing = expected.removesuffix(trained)
            straddling = tokenizer.decode(ids[begin - 1])
            assert decomposed(straddling).endswith(decomposed(missing)), (
                "one token, which begins before the turn"
            )
            assert decomposed(straddling) != decomposed(missing)
            num_straddling += 1
    assert encoded.num_straddling_tokens == num_straddling


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def encoder_of(tokenizer: Any, template: Template) -> Encoder | None:
    """Return None where the template cannot be certified."""
    tokenizer.chat_template = template.jinja()
    config = EncodeConfig(tokenizer="generated", empty_answer="train")
    try:
        return Encoder(tokenizer, config, certify(tokenizer, config))
    except TemplateError:
        return None


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(template=templates, conversations_=st.lists(conversations(), min_size=3, max_size=6))
def test_ids_are_served_and_answers_trained(
    chatml_tokenizer, template: Template, conversations_: list[list[Message]]
) -> None:
    encoder = encoder_of(chatml_tokenizer, template)
    assume(encoder is not None)
    assert encoder is not None
    # By new programs, and then by programs that are kept.
    for messages in [*conversations_, *conversations_[::-1]]:
        check(encoder, messages, template.answers(messages))


def test_rows_of_one_shape_keep_their_answers(chatml_tokenizer) -> None:
    """Each content with each other one, so that a kept program meets each answer of each guard."""
    contents = [
        "",
        "a",
        "ab\n",
        "loud",
        "x</think>\n\ny",
        "a;b ;c;d",
        " pad ",
        "<|im_end|>",
        "### assistant:\n",
        "long " * 20,
    ]
    plain = Template("### {}:\n", "<|im_end|>", "\n", "", False, THOUGHTS[1], ANSWERS[0])

    for answer in ANSWERS:
        template = replace(plain, answer=answer)
        encoder = encoder_of(chatml_tokenizer, template)
        assert encoder is not None
        for first, second in itertools.product(contents, repeat=2):
            messages = [
                {"role": "user", "content": first},
                {"role": "assistant", "content": first, "reasoning_content": second},
                {"role": "user", "content": second},
                {"role": "assistant", "content": second, "reasoning_content": first},
            ]
            check(encoder, messages, template.answers(messages))


def test_nearly_all_templates_are_certified(chatml_tokenizer) -> None:
    plain = Template(HEADERS[0], TERMINATORS[0], AFTER[0], "", False, THOUGHTS[0], ANSWERS[0])
    tried = [
        replace(plain, thought=thought, answer=answer)
        for thought, answer in itertools.product(THOUGHTS, ANSWERS)
    ]
    tried += [
        replace(
            plain,
            header=header,
            terminator=terminator,
            after=after,
            is_system_merged=after == "",
        )
        for header, terminator, after in itertools.product(HEADERS, TERMINATORS, AFTER)
    ]

    certified = [
        template for template in tried if encoder_of(chatml_tokenizer, template) is not None
    ]
    assert len(certified) > 0.9 * len(tried)
