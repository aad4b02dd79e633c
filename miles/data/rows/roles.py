"""Names of roles in rows -> roles of messages.

"gpt"                                    ->  assistant
"GPT", which is no exact name            ->  assistant, without regard to case
"npc", under --role-names npc=assistant  ->  assistant
"npc"                                    ->  the row is dropped, and the name is quoted
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, NoReturn

from miles.common.shown import cut
from miles.data.rows.reject import reject, type_of

CALL = "tool_call"
"""The role of a turn whose content is a tool call, or a list of them: the assistant's."""
ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": CALL,
    "tool_call": CALL,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
"""Name of a role in the rows -> role of the message. All names are in lower case."""
MAX_QUOTED = 40
"""Characters of an unknown role that a detail quotes."""


def find_role(name: Any, named: Mapping[str, str]) -> str | None:
    """Return the role that a name stands for; None if it is not known.

    An exact name comes first, then one in any case. Of equals, the user's comes first.

    Args:
        named: the roles that the user named: `RowFormat.roles`.
    """
    if type(name) is not str:
        return None
    role = named.get(name) or ROLES.get(name)
    if role is not None:
        return role

    folded = name.casefold()
    for own_name, own_role in named.items():
        if own_name.casefold() == folded:
            return own_role
    return ROLES.get(folded)


def reject_unknown_role(name: Any, where: str) -> NoReturn:
    """Reject a row for a turn whose role is not known; its name is quoted, being no secret.

    Args:
        where: the turn's place in the row.
    """
    if name is None:
        reject("unknown_role", f"{where} has no role: none of the keys role, from and speaker")
    if type(name) is not str:
        reject("unknown_role", f"{where}: its role is {type_of(name)}, not a name")

    text = cut(name, MAX_QUOTED).encode("utf-8", "replace").decode("utf-8")
    quoted = json.dumps(text, ensure_ascii=False)
    such_as = shlex.quote(f'{{{quoted}: "ROLE"}}') if len(name) <= MAX_QUOTED else "JSON"
    reject(
        "unknown_role",
        f"{where}: its role {quoted} is not known; --role-names {such_as} would say what it is "
        "(system, user, assistant or tool)",
    )
