"""Fixtures that several test modules share: real assets where they are, and a small tokenizer made here."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parent.parent

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORD_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Tokens of their own that are not special, as in Qwen3."""

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- 'You may call these functions:' }}
{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
{%- set last.question = loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- elif message.role == 'assistant' %}
{%- set answer = message.content %}
{%- set thought = message.reasoning_content or '' %}
{%- if not thought and '</think>' in answer %}
{%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set answer = answer.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.question and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + answer.lstrip('\n') }}
{%- else %}
{{- answer }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
"""ChatML with Qwen3's habits: an empty think block before the last answer, earlier reasoning left out."""

_CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the user asks the assistant for an answer.",
    "def add(a, b):\n    return a + b\n\nassert add(2, 2) == 4\n",
    "Was ist die Hauptstadt von Frankreich? Die Hauptstadt ist Paris.",
    "法国的首都是哪里？法国的首都是巴黎。",
    "user\nassistant\n\nsystem\n\n\nthe end",
)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs stays out of the user's home, here and in the processes that Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAMILESTEST0001",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests-9f2c61",
    "AWS_SESSION_TOKEN": "token-of-the-tests-77ab02",
}
"""Credentials of `bucket`: long enough to be found wherever they should not be."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server on loopback; credentials from the environment, as in a user's shell."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # its buckets are the process's: those of a test before
    for name, value in {**SECRETS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers and rows (`MILES_ASSETS`)."""
    path = Path(os.environ.get("MILES_ASSETS", PROJECT.parent / "shared" / "assets"))
    if not path.is_dir():
        pytest.skip(f"real assets are not at {path}; name their folder in MILES_ASSETS")
    return path


@pytest.fixture(scope="session")
def chatml_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small byte-level BPE tokenizer, Qwen3's special tokens and the template above."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 8, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in WORD_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    folder = tmp_path_factory.mktemp("chatml") / "tokenizer"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def chatml_tokenizer(chatml_tokenizer_folder: Path) -> Any:
    """That tokenizer, loaded afresh: a test may change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chatml_tokenizer_folder)
