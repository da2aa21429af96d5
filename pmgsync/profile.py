"""Profiles: which tables and files are kept the same, and how. Read from TOML and checked; pure but for the reading."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from pmgsync.errors import ConfigError

RULE_KINDS = ("greatest", "least", "latest", "advance")
OWN_SCHEMA = "pmgsync"


class Policy(Enum):
    """Who may write a table, and what the other nodes do with it."""

    MIRROR = "mirror"
    OWNED = "owned"
    MERGE = "merge"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class MergeRule:
    """How two values of one column become one.

    Attributes:
        kind: `greatest`, `least`, `latest` (the value whose row has the greater `by`), or `advance` along `order`.
        by: for `latest`, the column that decides.
        order: for `advance`, the values from first to last.
        tie: for `latest`, the value that wins when `by` is equal; None: the greater text wins.
    """

    kind: str
    by: str | None = None
    order: tuple[str, ...] = ()
    tie: str | None = None


@dataclass(frozen=True, slots=True)
class TableRule:
    """One table's policy.

    Attributes:
        key: the columns that find a row, () for the table's own key.
        owner: for `owned`, the column with the CID of the row's owner; for `merge`, of the node that inserts it.
        local_columns: columns that differ from node to node.
        deletes: for `merge`, whether deletes travel.
    """

    schema: str
    name: str
    policy: Policy
    key: tuple[str, ...] = ()
    owner: str | None = None
    local_columns: frozenset[str] = frozenset()
    rules: Mapping[str, MergeRule] = field(default_factory=dict)
    deletes: bool = True


@dataclass(frozen=True, slots=True)
class FileTree:
    """Files that are kept the same: `config` flows from the master to all, `spool` belongs to each node."""

    kind: str
    root: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    delete: bool


@dataclass(frozen=True, slots=True)
class Action:
    """A command to run when a file, or the rules (`files` empty), changed."""

    files: tuple[str, ...]
    tables: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """What a node keeps the same as the others."""

    name: str
    tables: tuple[TableRule, ...]
    all_tables: bool
    sequences: bool
    ddl: bool
    cid0: tuple[tuple[str, str], ...]
    services: tuple[str, ...]
    files: tuple[FileTree, ...]
    actions: tuple[Action, ...]

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], TableRule]:
        return {(rule.schema, rule.name): rule for rule in self.tables}

    def rule_for(self, schema: str, table: str) -> TableRule | None:
        """Return the rule of a table, None when it is not kept the same."""
        rule = self._by_name.get((schema, table))
        if rule is not None or not self.all_tables:
            return rule
        if schema == OWN_SCHEMA or schema == "information_schema" or schema.startswith("pg_"):
            return None
        return TableRule(schema, table, Policy.MIRROR)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of what the profile says; nodes of a cluster must agree on it."""

        def plain(value: Any) -> Any:
            return value.value if isinstance(value, Enum) else sorted(value)

        text = json.dumps(
            [[asdict(rule) for rule in self.tables], self.all_tables, self.sequences, self.ddl, self.cid0],
            sort_keys=True,
            default=plain,
        )
        return hashlib.sha256(text.encode()).hexdigest()


class _Reader:
    """Takes keys out of a table of the file; what is left over at the end is unknown."""

    def __init__(self, file: str, where: str, values: object) -> None:
        self._file = file
        self._where = where
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {where} is {values!r:.60}, expected a table")
        self._values: dict[str, Any] = dict(values)
        self._known: list[str] = []

    def fail(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self._file}: {self._where} {key} is {self._values.get(key)!r:.80}, expected {expected}")

    def text(self, key: str, default: str | None = None, *, choices: tuple[str, ...] = ()) -> str:
        expected = f"one of {', '.join(choices)}" if choices else "a text"
        value = self._take(key, default)
        if not isinstance(value, str) or not value or (choices and value not in choices):
            raise self.fail(key, expected)
        return value

    def optional(self, key: str) -> str | None:
        return self.text(key) if key in self._values else self._take(key, None)

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if type(value) is not bool:
            raise self.fail(key, "true or false")
        return value

    def texts(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        value = self._take(key, list(default))
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.fail(key, "a list of texts")
        if len(set(value)) != len(value):
            raise self.fail(key, "a list without repetitions")
        return tuple(value)

    def tables(self, key: str) -> list[Any]:
        value = self._take(key, [])
        if not isinstance(value, list):
            raise self.fail(key, f"tables, written [[{key}]]")
        return value

    def table(self, key: str) -> dict[str, Any]:
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise self.fail(key, "a table")
        return value

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        return self._values.get(key, default)

    def end(self) -> None:
        for key in self._values:
            if key not in self._known:
                close = difflib.get_close_matches(key, self._known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(self._known)}"
                raise ConfigError(f"{self._file}: {self._where} {key} is not a key that pmgsync knows", hint=hint)


def _read_rule(file: str, where: str, values: object) -> MergeRule:
    reader = _Reader(file, where, values if not isinstance(values, str) else {"rule": values})
    kind = reader.text("rule", choices=RULE_KINDS)
    by, order, tie = reader.optional("by"), reader.texts("order"), reader.optional("tie")
    reader.end()
    if (kind == "latest") != (by is not None):
        raise reader.fail("by", "a column, for the rule latest and no other")
    if (kind == "advance") != (len(order) >= 2):
        raise reader.fail("order", "at least two values, for the rule advance and no other")
    if tie is not None and kind != "latest":
        raise reader.fail("tie", "nothing: only the rule latest has ties")
    return MergeRule(kind, by, order, tie)


def _read_table(file: str, number: int, values: object) -> TableRule:
    where = f"[[table]] {number}"
    reader = _Reader(file, where, values)
    full = reader.text("name")
    where = f"[[table]] {full}:"
    reader = _Reader(file, where, values)
    reader.text("name")
    schema, dot, name = full.rpartition(".")
    policy = Policy(reader.text("policy", choices=tuple(policy.value for policy in Policy)))
    key, owner = reader.texts("key"), reader.optional("owner")
    local, deletes = reader.texts("local"), reader.flag("deletes", True)
    rules = {
        column: _read_rule(file, f"{where} merge.{column}:", rule) for column, rule in reader.table("merge").items()
    }
    reader.end()
    if policy is Policy.OWNED and owner is None:
        raise reader.fail("owner", "the column with the owner's CID")
    if owner is not None and policy not in {Policy.OWNED, Policy.MERGE}:
        raise reader.fail("owner", f"nothing: a {policy.value} table has no owner column")
    if (policy is Policy.MERGE) != bool(rules):
        raise reader.fail("merge", "a rule a column, for the policy merge and no other")
    if policy is Policy.MERGE and not key:
        raise reader.fail("key", "the columns that find a row")
    for column in (*key, *([owner] if owner else []), *rules):
        if column in local:
            raise reader.fail("local", f"columns that no rule uses, but {column} is used")
    for column in rules:
        if column in key:
            raise reader.fail("merge", f"rules of columns that are not in the key, but {column} is")
    return TableRule(schema if dot else "public", name, policy, key, owner, frozenset(local), rules, deletes)


def _read_files(file: str, number: int, values: object) -> FileTree:
    reader = _Reader(file, f"[[files]] {number}", values)
    tree = FileTree(
        reader.text("kind", choices=("config", "spool")),
        reader.text("root"),
        reader.texts("include"),
        reader.texts("exclude"),
        reader.flag("delete", True),
    )
    reader.end()
    return tree


def _read_action(file: str, number: int, values: object) -> Action:
    reader = _Reader(file, f"[[action]] {number}", values)
    action = Action(reader.texts("files"), reader.texts("tables"), reader.texts("command"))
    reader.end()
    if not action.command or not (action.files or action.tables):
        raise reader.fail("command", "a command, and files or tables whose change asks for it")
    return action


def read_profile(name: str, file: str, text: str) -> Profile:
    """Return the profile in TOML text; `file` is what errors call it.

    Raises:
        ConfigError: names file, key and what was expected.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the profile {file} is not TOML ({error})") from error
    reader = _Reader(file, "", data)
    tables = tuple(_read_table(file, number, one) for number, one in enumerate(reader.tables("table"), 1))
    names = [(rule.schema, rule.name) for rule in tables]
    for each in names:
        if names.count(each) > 1:
            raise ConfigError(f"{file}: the table {'.'.join(each)} has more than one [[table]]")
    cid0 = []
    for entry in reader.texts("cid0"):
        table, _, column = entry.rpartition(".")
        if not table or not column:
            raise reader.fail("cid0", 'entries such as "table.column"')
        cid0.append((table, column))
    profile = Profile(
        name,
        tables,
        reader.flag("all_tables", False),
        reader.flag("sequences", True),
        reader.flag("ddl", False),
        tuple(cid0),
        reader.texts("services"),
        tuple(_read_files(file, number, one) for number, one in enumerate(reader.tables("files"), 1)),
        tuple(_read_action(file, number, one) for number, one in enumerate(reader.tables("action"), 1)),
    )
    reader.end()
    if not profile.tables and not profile.all_tables:
        raise ConfigError(f"{file}: no table is named, and all_tables is not true")
    return profile


def load_profile(name: str) -> Profile:
    """Return a shipped profile by its name, or one in a file by its path.

    Raises:
        ConfigError: when there is none, or it says something that cannot be used.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]+", name):
        shipped = resources.files("pmgsync") / "profiles"
        file = shipped / f"{name}.toml"
        if not file.is_file():
            names = sorted(entry.name.removesuffix(".toml") for entry in shipped.iterdir() if entry.name != "__init__")
            raise ConfigError(
                f"there is no profile {name!r}", hint=f"shipped are {', '.join(names)}; a file is named by its path"
            )
        return read_profile(name, f"profile {name}", file.read_text(encoding="utf-8"))
    path = Path(name)
    try:
        return read_profile(path.stem, str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the profile {path} cannot be read ({error})") from error
