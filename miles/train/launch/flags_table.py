"""docs/flags.md, made from the declared flags.

python -m miles.train.launch.flags_table > docs/flags.md
"""

from __future__ import annotations

from miles.common.flags import Setting, flag_of
from miles.train.config import TrainConfig
from miles.train.launch.fixed_flags import FIXED_TITLE, REPLACED_TITLE
from miles.train.launch.model_flags import SIZES_TITLE
from miles.train.launch.parser import default_of, launch_groups
from miles.train.launch.refusals import REFUSALS

_HEAD = """\
# Flags of `miles train`

Made from the code (`python -m miles.train.launch.flags_table`); a test compares. Names are Miles's,
so that its SFT scripts run as they are, and one for reinforcement learning needs only its SFT lines
changed. Each flag is declared once, on the field that it fills (`miles/train/config.py`,
`miles/data/config.py`).

## Settings from a file

`--config run.yaml` reads flags from a YAML mapping; what is on the line has the last word.

```yaml
hf-checkpoint: Qwen/Qwen3-4B-Base      # names with - or _
prompt_data: [hermes, hermes.parquet, orca, orca.parquet]
rollout_shuffle: true                  # a switch: true or false, nothing else
lr: 1e-5                               # a number is a number
wandb_group: "2024"                    # text that looks like a number stands in quotes
apply_chat_template_kwargs: {enable_thinking: false}
```

A value of another type than the flag takes (`num_epoch: off`, `lr:` with nothing behind it), an
unknown name and a name that stands twice are errors that give the file, the line and the flag.

## Paths

A path is a URL (`s3://…`, `hf://…`) or local; a local one counts from the folder in which the
command is typed, also in a `--config` file, and is kept as an absolute path from there on. `~` and
`file://` are understood. `*`, `?` and `[` make a pattern of a word that is no file or folder: a
file named `rows[v2].jsonl` is that file.
"""

_COLUMNS = """\
| flag | value | default | meaning |
|---|---|---|---|
"""

_SHORT_COLUMNS = """\
| flag | value | meaning |
|---|---|---|
"""

_REFUSED = """\
## Refused by name

These are never ignored: the error says why, and what to do. `*` stands for any ending. Any other
name that is not above is refused as well, with the flag that is spelt most like it.

| flags | why | what to do |
|---|---|---|
"""


def table(record: type = TrainConfig) -> str:
    """Return the page, in Markdown.

    Args:
        record: the settings of a run.
    """
    parts = [_HEAD]
    for title, settings in launch_groups(record):
        is_setting = title not in (FIXED_TITLE, REPLACED_TITLE, SIZES_TITLE)
        columns = _COLUMNS if is_setting else _SHORT_COLUMNS
        rows = [_row(setting, with_default=is_setting) for setting in settings]
        parts.append(f"## {title}\n\n{columns}" + "".join(rows))
    return "\n".join([*parts, _REFUSED]) + _refused_rows()


def _row(setting: Setting, *, with_default: bool) -> str:
    default = [_default(setting)] if with_default else []
    cells = [f"`{setting.flag.name}`", _value(setting), *default, _escape(setting.flag.help)]
    return "| " + " | ".join(cells) + " |\n"


def _value(setting: Setting) -> str:
    """Return the allowed values, or the unit; nothing for a switch."""
    if setting.flag.choices:
        return ", ".join(f"`{choice}`" for choice in setting.flag.choices)
    return setting.flag.metavar + (" …" if setting.is_list else "")


def _default(setting: Setting) -> str:
    """Return the default; as code where it is a value, as prose where it is words."""
    text = default_of(setting)
    is_value = bool(text) and not setting.is_required and not setting.flag.default
    return f"`{text}`" if is_value else _escape(text)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _refused_rows() -> str:
    rows = ""
    for refusal in REFUSALS:
        names = ", ".join(f"`{flag_of(name)}`" for name in refusal.names.split())
        rows += f"| {names} | it {refusal.reason} | {refusal.remedy} |\n"
    return rows


if __name__ == "__main__":
    print(table(), end="")
