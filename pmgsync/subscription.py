"""The level of this node's subscription, as a file or a program says it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from pmgsync.config import Subscription
from pmgsync.errors import ConfigError

COMMAND_S = 10.0
MAX_LEVEL = 64
"""Characters."""
_HINT = "see [subscription] in node.toml"


def read_level(subscription: Subscription) -> str:
    """Return the level, "" when node.toml does not say where it is found.

    Raises:
        ConfigError: when it cannot be found, or is not a line of text.
    """
    if subscription.level:
        return _checked(subscription.level, "[subscription] level")
    if subscription.file:
        where = f"the file {subscription.file}"
        text = _read_file(subscription.file)
    elif subscription.command:
        where = f"what {subscription.command[0]} prints"
        text = _run(subscription.command)
    else:
        return ""
    if subscription.pattern:
        match = re.search(subscription.pattern, text)
        if match is None:
            raise ConfigError(f"{where} has no subscription level that {subscription.pattern!r} finds", hint=_HINT)
        return _checked((match[1] or "").strip(), where)
    return _checked(next((line.strip() for line in text.splitlines() if line.strip()), ""), where)


def level_difference(here: str, there: str) -> str:
    """Return a sentence about two levels that differ, "" when they do not, or one of them is not known."""
    if here == there or not here or not there:
        return ""
    return f"the subscription level of this node is {here!r}, the cluster's is {there!r}: all members need the same"


def _read_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"the subscription level cannot be read from {path} ({error.strerror})", hint=_HINT
        ) from error


def _run(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace",
            timeout=COMMAND_S,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"{command[0]}, which says the subscription level, cannot be run ({error.strerror})", hint=_HINT
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]} did not say the subscription level within {COMMAND_S:.0f} s", hint=_HINT) \
            from error  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        raise ConfigError(
            f"{command[0]}, which says the subscription level, ended with {done.returncode} ({said[0]:.200})",
            hint=_HINT,
        )
    return done.stdout


def _checked(level: str, where: str) -> str:
    if not level:
        raise ConfigError(f"{where} has no subscription level", hint=_HINT)
    if len(level) > MAX_LEVEL or not level.isprintable():
        raise ConfigError(f"the subscription level in {where} is not a word: {level!r:.80}", hint=_HINT)
    return level
