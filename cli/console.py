"""What the person at the terminal gets to see: lines, notes, questions. Text from elsewhere is made harmless first."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

from pmgsync.errors import PmgsyncError

Say = Callable[[str], None]


class InterruptedBySignalError(BaseException):
    """A person (Ctrl-C) or the system (SIGTERM) wants the command to end; everything that was begun is cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        self.number = number


class CommandFailedError(PmgsyncError):
    """A command did not do what was asked for, and has said on its own why; only the exit code is left to set."""

    def __init__(self) -> None:
        super().__init__("the command failed")


def printable(text: str) -> str:
    """Return text on one line without control characters: names and errors come from other machines, and an escape
    sequence in them would speak to the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def say(text: str = "") -> None:
    """Print a line of the result, at once: whoever reads a pipe wants to see it now."""
    print(text, flush=True)  # noqa: T201


def note(text: str) -> None:
    """Print a line of progress or advice, which is not part of the result."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def say_json(value: Any) -> None:
    """Print a value as JSON, on one line for a pipe, indented for a person."""
    say(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def print_error(error: PmgsyncError) -> None:
    """Print what was wrong and what can be done about it."""
    message, *more = error.message.split("\n")
    note("\n".join([f"error: {printable(message)}", *map(printable, more)]))
    for line in getattr(error, "__notes__", ()):
        note(f"note: {printable(line)}")
    for line in error.hint.splitlines():
        note(f"hint: {printable(line)}")


def ask(question: str, *, without_terminal: str) -> str:
    """Ask a person for a line of text.

    Raises:
        PmgsyncError: when nobody is there to answer; `without_terminal` is the hint.
    """
    if not sys.stdin.isatty():
        raise PmgsyncError(f"nobody can be asked for {question!r}, there is no terminal", hint=without_terminal)
    sys.stderr.write(f"{question}: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip()


def ask_secret(question: str, *, without_terminal: str) -> str:
    """Ask a person for something that is not to be seen while it is typed.

    Raises:
        PmgsyncError: when nobody is there to answer; `without_terminal` is the hint.
    """
    if not sys.stdin.isatty():
        raise PmgsyncError(f"nobody can be asked for the {question}, there is no terminal", hint=without_terminal)
    return getpass.getpass(f"{question}: ", stream=sys.stderr)


def confirm(question: str, *, option: str = "--yes") -> Literal[True]:
    """Ask a person to type yes.

    Raises:
        PmgsyncError: when the answer is anything else, or nobody is there to answer.
    """
    answer = ask(f"{question} Type yes to go on", without_terminal=f"add {option} to go on without being asked")
    if answer.lower() not in {"y", "yes"}:
        raise PmgsyncError("not confirmed, nothing was changed")
    return True


def amount(count: float) -> str:
    """Return a number of bytes for a person."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a time span for a person, 4:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
