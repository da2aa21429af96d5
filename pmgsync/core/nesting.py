"""How deep structures from the network may be nested. Pure.

MessagePack and JSON may be nested about as deep as Python's stack goes. What is read without trouble then ends the
process where it is shown: `repr` in the sentence that refuses it goes some calls deeper.
"""

from __future__ import annotations

from typing import Any

from pmgsync.errors import ProtocolError

MAX_DEPTH = 16
"""Lists and maps inside each other; nothing in PROTOCOL.md has more than six."""


def check_nesting(value: Any) -> None:
    """Refuse a structure that is nested too deep, without descending into it.

    Raises:
        ProtocolError: when it is.
    """
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
    if level:
        raise ProtocolError(f"lists and maps are nested more than {MAX_DEPTH} deep")
