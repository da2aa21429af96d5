"""Users and groups by name: the same name may have another number on another node."""

from __future__ import annotations

import functools
import grp
import os
import pwd
import time
from collections.abc import Callable

FORGET_S = 60.0
"""Names are asked for again after this: users are created while the agent runs."""


class _Names:
    """A cache of one data base of the system, both ways."""

    def __init__(self, name_of: Callable[[int], str], number_of: Callable[[str], int]) -> None:
        self._name_of = name_of
        self._number_of = number_of
        self._names: dict[int, str] = {}
        self._numbers: dict[str, int | None] = {}
        self._since = 0.0

    def name(self, number: int) -> str:
        """Return a number's name, the number as text when it has none."""
        self._expire()
        if number not in self._names:
            try:
                self._names[number] = self._name_of(number)
            except KeyError:
                self._names[number] = str(number)
        return self._names[number]

    def number(self, name: str) -> int | None:
        """Return a name's number, None when this system does not know it."""
        self._expire()
        if name not in self._numbers:
            try:
                self._numbers[name] = self._number_of(name)
            except (KeyError, ValueError):
                self._numbers[name] = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else None
        return self._numbers[name]

    def _expire(self) -> None:
        now = time.monotonic()
        if now - self._since > FORGET_S:
            self._names.clear()
            self._numbers.clear()
            self._since = now


_users = _Names(lambda uid: pwd.getpwuid(uid).pw_name, lambda name: pwd.getpwnam(name).pw_uid)
_groups = _Names(lambda gid: grp.getgrgid(gid).gr_name, lambda name: grp.getgrnam(name).gr_gid)

user_name, user_id = _users.name, _users.number
group_name, group_id = _groups.name, _groups.number


@functools.cache
def may_give_away() -> bool:
    """True when this process can make files belong to others; no process changes that about itself."""
    return os.geteuid() == 0
