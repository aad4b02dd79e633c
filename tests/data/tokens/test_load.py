import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from miles.data.config import EncodeConfig
from miles.data.template.certify import certify
from miles.data.tokens.load import encoder_fingerprint, load_tokenizer, pin_date
from miles.errors import TemplateError


def config_of(folder: Path | str) -> EncodeConfig:
    return EncodeConfig(tokenizer=str(folder))


def test_loads_from_a_folder_and_from_urls(chatml_tokenizer_folder: Path) -> None:
    local = load_tokenizer(config_of(chatml_tokenizer_folder))
    by_file_url = load_tokenizer(config_of(f"file://{chatml_tokenizer_folder}"))
    memory = fsspec.filesystem("memory")
    memory.put(str(chatml_tokenizer_folder), "/test-tokenizer", recursive=True)
    memory.pipe("/test-tokenizer/model.safetensors", b"weights stay where they are")
    remote = load_tokenizer(config_of("memory://test-tokenizer"))
    config = config_of("anything")
    assert (
        encoder_fingerprint(local, config)
        == encoder_fingerprint(by_file_url, config)
        == encoder_fingerprint(remote, config)
    )


def test_is_cached_by_content(chatml_tokenizer_folder: Path, tmp_path: Path) -> None:
    config = config_of(chatml_tokenizer_folder)
    tokenizer = load_tokenizer(config)
    assert load_tokenizer(config) is tokenizer
    other = load_tokenizer(replace(config, chat_template="{{ messages }}"))
    assert other is not tokenizer
    assert other.chat_template == "{{ messages }}"

    folder = tmp_path / "copy"
    folder.mkdir()
    for file in chatml_tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    first = load_tokenizer(config_of(folder))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    assert load_tokenizer(config_of(folder)).chat_template != first.chat_template


def test_a_changed_tokenizer_is_loaded_again(
    chatml_tokenizer_folder: Path,
) -> None:
    config = config_of(chatml_tokenizer_folder)
    tokenizer = load_tokenizer(config)
    template = tokenizer.chat_template
    tokenizer.chat_template = "something else"
    assert load_tokenizer(config).chat_template == template


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing" / "a" / "b", "no such folder"),
        (lambda folder: folder / "a.txt", "a file, not a folder"),
        (
            lambda folder: folder,
            r"no tokenizer in this folder; expected tokenizer\.json .* found a\.txt",
        ),
    ],
)
def test_a_wrong_path_is_named(make, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(TemplateError, match=message):
        load_tokenizer(config_of(make(tmp_path)))


def test_a_broken_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"not": "a tokenizer"}')
    with pytest.raises(TemplateError, match="cannot be loaded"):
        load_tokenizer(config_of(tmp_path))


def test_a_hub_name_fails_clearly_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        TemplateError, match="no such folder, and the Hugging Face hub did not give"
    ):
        load_tokenizer(config_of("nobody/no-such-tokenizer"))


def test_no_template_and_several_templates(chatml_tokenizer, tmp_path: Path) -> None:
    chatml_tokenizer.chat_template = None
    chatml_tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(TemplateError, match="has no chat template"):
        load_tokenizer(config_of(tmp_path / "none"))
    chatml_tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    chatml_tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(TemplateError, match=r"several chat templates \(default, tool_use\)"):
        load_tokenizer(config_of(tmp_path / "two"))


def test_dates_are_pinned() -> None:
    assert (
        pin_date("{{ strftime_now('%d %b %Y') }} {{- strftime_now(\"%Y\") }}")
        == '{{ "01 Jan 2025" }} {{- "2025" }}'
    )


def test_fingerprint_covers_tokens_and_masks(chatml_tokenizer) -> None:
    config = config_of("anywhere")
    fingerprint = encoder_fingerprint(chatml_tokenizer, config)
    assert fingerprint == encoder_fingerprint(chatml_tokenizer, config_of("elsewhere"))
    variants = {
        encoder_fingerprint(chatml_tokenizer, replace(config, **change))
        for change in (
            {"turns": "last"},
            {"empty_think": "train"},
            {"special_text": "reject"},
            {"max_sample_tokens": 100},
            {"template_kwargs": {"enable_thinking": False}},
        )
    }
    chatml_tokenizer.chat_template += " "
    variants.add(encoder_fingerprint(chatml_tokenizer, config))
    chatml_tokenizer.add_tokens(["<new>"])
    variants.add(encoder_fingerprint(chatml_tokenizer, config))
    assert len(variants | {fingerprint}) == 8


def test_fingerprint_is_equal_across_processes(chatml_tokenizer_folder: Path) -> None:
    config = config_of(chatml_tokenizer_folder)
    program = (
        "from miles.data.config import EncodeConfig\n"
        "from miles.data.tokens.load import encoder_fingerprint, load_tokenizer\n"
        f"config = EncodeConfig(tokenizer={str(chatml_tokenizer_folder)!r})\n"
        "print(encoder_fingerprint(load_tokenizer(config), config))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "12345", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.split()[-1] == encoder_fingerprint(load_tokenizer(config), config)


def test_remote_code_runs_only_if_trusted(
    chatml_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, trace = tmp_path / "tokenizer", tmp_path / "ran"
    shutil.copytree(chatml_tokenizer_folder, folder)
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(trace)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TemplateError, match="brings code of its own, which was not run"):
        load_tokenizer(EncodeConfig(tokenizer=str(folder)))
    assert not trace.exists()
    trusted = load_tokenizer(EncodeConfig(tokenizer=str(folder), trust_remote_code=True))
    assert trace.exists()
    assert type(trusted).__name__ == "Own"


def test_a_tokenizer_that_fails_when_it_is_used_is_named(chatml_tokenizer) -> None:
    chatml_tokenizer.model_max_length = "x"
    with pytest.raises(TemplateError, match="folder: the tokenizer loads, but its library fails"):
        certify(chatml_tokenizer, config_of("folder"))


def test_the_file_that_cannot_be_loaded_is_named(
    chatml_tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(chatml_tokenizer_folder, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["tokenizer_class"]
    path.write_text(json.dumps(settings))
    model = {"model_type": "qwen3", "rope_scaling": 3}
    (folder / "config.json").write_text(json.dumps(model))
    with pytest.raises(TemplateError, match=r"/config\.json: cannot be loaded: its library .*rope"):
        load_tokenizer(config_of(folder))
