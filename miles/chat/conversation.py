"""A conversation with a model: its messages, and what takes some of them back.

> What is 2+2?      user, assistant
> /undo             the last question and its answer are gone
> /reset            all but the system message are gone
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from miles.common import storage


@dataclass
class Conversation:
    """Messages in turn: maybe a system message, then questions and answers."""

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    """questions with their answers"""

    def messages(self, question: str | None = None) -> list[dict[str, Any]]:
        """Return OpenAI messages.

        Args:
            question: to append; None: there is none.
        """
        messages = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for asked, answer in self.turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages

    def add(self, question: str, answer: str) -> None:
        """Append a question and its answer."""
        self.turns.append((question, answer))

    def undo(self) -> str | None:
        """Take the last question and its answer back; return the question, None without one."""
        return self.turns.pop()[0] if self.turns else None

    def reset(self) -> int:
        """Take all questions and answers back; return how many there were."""
        num_turns = len(self.turns)
        self.turns.clear()
        return num_turns

    def save(self, url: str) -> None:
        """Append the conversation to a file, as a row that `miles prepare` and `miles train` read.

        Raises:
            SourceError: what is in the file cannot be read.
            WriteError: it cannot be written.
        """
        row = json.dumps({"messages": self.messages()}, ensure_ascii=False)
        earlier = storage.read_text(url) if storage.exists(url) else ""
        if earlier and not earlier.endswith("\n"):
            earlier += "\n"
        storage.write_text(url, f"{earlier}{row}\n")
