"""Takes a secret that was given on the command line out of what `ps` shows of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

SECRET_OPTIONS = frozenset({"--token"})
ARGUMENTS_BEGIN, ARGUMENTS_END = 45, 46
"""Fields of /proc/PID/stat after the program's name."""


def hide_secrets(arguments: Sequence[str]) -> None:
    """Overwrite the values of secret options in the memory that everybody sees as the command line.

    It is not hidden before this is called, so such a secret must be worth little by itself: a token lets one node in.
    Where the system does not allow it, nothing happens.
    """
    given = [value for option, value in pairwise(arguments) if option in SECRET_OPTIONS]
    given += [one.partition("=")[2] for one in arguments if one.partition("=")[0] in SECRET_OPTIONS]
    secrets = [value.encode(errors="surrogateescape") for value in given if value]
    if not secrets:
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        begin, end = int(fields[ARGUMENTS_BEGIN]), int(fields[ARGUMENTS_END])
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(begin)
            shown = memory.read(end - begin)
            for secret in secrets:
                shown = shown.replace(b"\0" + secret, b"\0" + b"x" * len(secret))
                shown = shown.replace(b"=" + secret, b"=" + b"x" * len(secret))
            memory.seek(begin)
            memory.write(shown)
