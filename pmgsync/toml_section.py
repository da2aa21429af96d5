"""Sections of a TOML file, read key by key; an error names file, key and what was expected, and guesses a slip."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pmgsync.errors import ConfigError

T = TypeVar("T")
D = TypeVar("D")
Read = Callable[[Any], T]
"""Makes a value of what TOML has; raises ValueError or TypeError when it cannot."""


class Section:
    """One table of a file. Every key that is asked for is known; `end` refuses every other one.

    Attributes:
        values: what the file says, unchecked.
    """

    def __init__(self, path: Path, where: str, values: object) -> None:
        """Prepare.

        Args:
            where: how messages name the table, for example "[ports]"; "" for the file's top level.

        Raises:
            ConfigError: when it is not a table.
        """
        self.path, self.where = path, where
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {where} is {values!r:.60}, expected a table")
        self.values: dict[str, Any] = values
        self._known: list[str] = []

    def take(self, key: str, default: D, expected: str, read: Read[T]) -> T | D:
        """Return what `read` makes of a key's value, the default when the key is not there.

        Args:
            expected: what a good value is, the end of the sentence about one that is not.

        Raises:
            ConfigError: when `read` refuses the value.
        """
        self._known.append(key)
        if key not in self.values:
            return default
        value = self.values[key]
        try:
            return read(value)
        except (ValueError, TypeError):
            raise self.fail(key, f"is {value!r:.100}, expected {expected}") from None

    def require(self, key: str, expected: str, read: Read[T]) -> T:
        """Return what `read` makes of the value of a key that must be there.

        Raises:
            ConfigError: when it is not there, or `read` refuses the value.
        """
        value = self.take(key, None, expected, read)
        if value is None:
            raise self.fail(key, f"is missing, expected {expected}")
        return value

    def section(self, key: str) -> Section:
        """Return the table of a key, an empty one when it is not there."""
        self._known.append(key)
        return Section(self.path, f"[{key}]", self.values.get(key, {}))

    def sections(self, key: str) -> list[Section]:
        """Return the tables of an array of tables.

        Raises:
            ConfigError: when it is something else.
        """
        entries = self.take(key, [], f"[[{key}]]", as_list)
        return [Section(self.path, f"[[{key}]] number {number}", entry) for number, entry in enumerate(entries, 1)]

    def fail(self, key: str, problem: str, *, hint: str = "") -> ConfigError:
        """Return the error that a key has a problem."""
        name = f"{self.where} {key}" if self.where else key
        return ConfigError(f"{self.path}: {name} {problem}", hint=hint)

    def end(self) -> None:
        """Refuse the keys that were not asked for.

        Raises:
            ConfigError: when there is one.
        """
        for key in self.values:
            if key not in self._known:
                raise self.fail(
                    key,
                    "is not a key that pmgsync knows",
                    hint=did_you_mean(key, self._known) or f"the keys here are {', '.join(self._known)}",
                )


def read_toml(path: Path, what: str, *, hint: str = "") -> Section:
    """Return a file's top level.

    Args:
        what: the file's part in messages, for example "the profile".
        hint: what to do when the file cannot be read.

    Raises:
        ConfigError: when it cannot be read, or is not TOML.
    """
    try:
        return Section(path, "", tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read ({error.strerror})", hint=hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} is not TOML ({error})") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known name most like this one, "" when none is like it."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else ""


def as_text(value: Any) -> str:
    """Return a text that is not empty."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return value


def as_flag(value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise ValueError
    return value


def as_list(value: Any) -> list[Any]:
    """Return a list of anything."""
    if not isinstance(value, list):
        raise ValueError
    return value


def as_table(value: Any) -> dict[str, Any]:
    """Return a table."""
    if not isinstance(value, dict):
        raise ValueError
    return value


def as_texts(value: Any) -> tuple[str, ...]:
    """Return a list of texts, each of which stands there once."""
    texts = tuple(map(as_text, as_list(value)))
    if len(set(texts)) != len(texts):
        raise ValueError
    return texts


def as_absolute(value: Any) -> str:
    """Return an absolute path."""
    if not Path(as_text(value)).is_absolute():
        raise ValueError
    return str(value)


def one_of(*allowed: T) -> Read[T]:
    """Return a reader of one of these values."""

    def read(value: Any) -> T:
        for known in allowed:
            if type(value) is type(known) and value == known:
                return known
        raise ValueError

    return read


def each(read: Read[str]) -> Read[tuple[str, ...]]:
    """Return a reader of a list of different texts, each of them as `read` makes it."""
    return lambda value: tuple(map(read, as_texts(value)))
