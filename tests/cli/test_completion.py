"""Completion scripts: those of zsh and fish parse there, that of bash completes in a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from miles.cli import main
from miles.cli.commands import build_parser
from miles.cli.completion import completion_script
from miles.cli.completion_file import SHELLS, place_of
from miles.train.launch.parser import build_parser as build_launch_parser
from tests.support.launch import OneMore


def completions(script: str, line: str, program: str = "miles") -> list[str]:
    """Return what bash offers for the last word of a line."""
    if not (bash := shutil.which("bash")):
        pytest.skip("needs bash")
    words = " ".join(f"'{word}'" for word in line.split(" "))
    code = f"""{script}
        COMP_WORDS=({words})
        COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
        COMP_LINE='{line}'
        COMP_POINT=${{#COMP_LINE}}
        complete_with=$(complete -p {program} | sed -E 's/.*-F ([^ ]+).*/\\1/')
        $complete_with {program} "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run([bash, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("miles tr", ["train"]),
        ("miles com", ["compare", "completion"]),
        ("miles convert meg", ["megatron-to-hf"]),
        ("miles convert mer", ["merge-adapter"]),
        ("miles convert merge-adapter --save-m", ["--save-megatron"]),
        ("miles completion ", ["bash", "zsh", "fish"]),
        ("miles train --max-tok", ["--max-tokens-per-gpu"]),
        ("miles train --lr-d", ["--lr-decay-style"]),
        ("miles train --too-long ", ["drop", "truncate_end", "error"]),
        ("miles train --lr 1e-5 --row-shape al", ["alpaca"]),
        ("miles prepare --special-text re", ["reject"]),
        ("miles train --prompt-data a b --eval-in", ["--eval-interval"]),
        ("miles train --hf-checkpoint --eval-in", ["--eval-interval"]),
        ("miles prepare x --source a --outp", ["--output"]),
    ],
)
def test_bash_completes(line: str, expected: list[str]) -> None:
    assert completions(completion_script(build_parser(), "bash"), line) == expected


def test_bash_completes_folders(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    script = completion_script(build_parser(), "bash")
    (tmp_path / "model.json").touch()
    for line in ("train --hf-checkpoint", "certify", "convert verify", "convert verify a"):
        found = completions(script, f"miles {line} {tmp_path}/mo")
        assert [word.rstrip("/") for word in found] == [f"{tmp_path}/model"], line


def test_a_declared_field_is_completed() -> None:
    script = completion_script(build_launch_parser(OneMore), "bash").replace("miles train", "miles")
    for shell in SHELLS:
        text = completion_script(build_launch_parser(OneMore), shell)
        assert "num-cups" in text
        assert "blue grey" in text
    assert completions(script, "miles --num-c") == ["--num-cups"]
    assert completions(script, "miles --sky g") == ["grey"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_of_its_shell(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "max-tokens-per-gpu" in script
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        done = subprocess.run([program, "-n", str(tmp_path / "script")], capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("shell", "place"),
    [
        ("bash", ".local/share/bash-completion/completions/miles"),
        ("zsh", ".local/share/zsh/site-functions/_miles"),
        ("fish", ".config/fish/completions/miles.fish"),
    ],
)
def test_the_script_is_put_where_the_shell_looks(
    shell: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "BASH_COMPLETION_USER_DIR", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")

    assert main(["completion", "--install"]) == 0
    first = capsys.readouterr().out
    path = tmp_path / place
    assert f"  wrote {path}\n" in first
    assert f"to undo it: rm {path}\n" in first
    assert "max-tokens-per-gpu" in path.read_text()
    if shell == "zsh":
        assert f"Add this line to {tmp_path}/.zshrc above the line with compinit: fpath=(" in first
        (tmp_path / ".zshrc").write_text(f"fpath=({path.parent} $fpath)\n")
    if shell == "bash":
        (tmp_path / ".bashrc").write_text(f"source {path}\n")

    before = path.stat()
    assert main(["completion", shell, "--install"]) == 0
    second = capsys.readouterr().out
    assert f"  up to date: {path}\n" in second
    assert "Add this line" not in second
    assert path.stat() == before


def test_an_installed_script_completes_in_bash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASH_COMPLETION_USER_DIR", str(tmp_path))
    assert main(["completion", "--install", "bash"]) == 0
    script = f"source {tmp_path}/completions/miles"
    assert completions(script, "miles inspect --sam") == ["--samples"]


def test_a_file_that_is_not_ours_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "fish" / "completions" / "miles.fish"
    path.parent.mkdir(parents=True)
    path.write_text("complete -c miles")
    assert main(["completion", "--install", "fish"]) == 5
    assert "a file that miles did not write" in capsys.readouterr().err
    assert path.read_text() == "complete -c miles"


@pytest.mark.parametrize(
    ("words", "shell", "message"),
    [
        ([], "/bin/bash", "name a shell, to have its script printed"),
        (["--install"], "/bin/tcsh", "SHELL is tcsh; name the shell: miles completion --install b"),
        (["--install"], "", "SHELL is not set; name the shell"),
    ],
)
def test_a_shell_that_is_not_known_is_asked_for(
    words: list[str],
    shell: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SHELL", shell)
    assert main(["completion", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_relative_folder_of_the_environment_counts_for_nothing(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "XDG_DATA_HOME": "share", "XDG_CONFIG_HOME": ""}
    for shell in SHELLS:
        assert place_of(shell, environment) == place_of(shell, {"HOME": str(tmp_path)})
