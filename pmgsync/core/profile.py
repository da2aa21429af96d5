"""Profiles: which tables and files are synchronised, and how. A TOML file, read and checked into plain values."""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pmgsync.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "profiles"
OWN_SCHEMA = "pmgsync"
"""The database schema of pmgsync's own state; mind the letters, they are not those of the package."""
DEFAULT_SCHEMA = "public"

RuleKind = Literal["greatest", "least", "latest", "advance"]
_KINDS: tuple[RuleKind, ...] = ("greatest", "least", "latest", "advance")


class Policy(Enum):
    """Who may write a table, and what the others do with the changes."""

    MIRROR = "mirror"
    """The master writes, the others are an exact copy."""
    OWNED = "owned"
    """A row is written by the node whose CID stands in its owner column."""
    MERGE = "merge"
    """Any node writes; each column says how two values become one."""
    LOCAL = "local"
    """Never synchronised."""


@dataclass(frozen=True, slots=True)
class MergeRule:
    """How two values of one column become one; commutative, associative and idempotent.

    Attributes:
        kind: `greatest` and `least` compare in the column's type, NULL loses; `latest` takes the value of the row whose
            `by` column is greater; `advance` takes the value that comes later in `order`.
        by: for `latest`, the column that is compared; columns with the same `by` move together.
        order: for `advance`, all values, first to last.
        tie: for `latest`, the value that wins when `by` is equal; None, or neither value: the greater one.
    """

    kind: RuleKind
    by: str | None = None
    order: tuple[str, ...] = ()
    tie: str | None = None


@dataclass(frozen=True, slots=True)
class TableRule:
    """What a profile says of one table.

    Attributes:
        key: the columns that find a row; () for the table's own key.
        owner: owned tables: the column with the CID of the node that writes the row.
        local_columns: columns whose values each node makes by itself.
        rules: merge tables: the rule of each column; a column without one keeps the value it was inserted with.
        deletes: merge tables: True when deletes travel; with `inserts_by_owner` only those of the owner do.
        inserts_by_owner: merge tables: rows are inserted (and deleted) by the node whose CID this column has.
    """

    schema: str
    name: str
    policy: Policy
    key: tuple[str, ...] = ()
    owner: str | None = None
    local_columns: frozenset[str] = frozenset()
    rules: Mapping[str, MergeRule] = field(default_factory=dict)
    deletes: bool = True
    inserts_by_owner: str | None = None

    @property
    def columns(self) -> frozenset[str]:
        """Every column that the rule refers to; the table must have them."""
        named = {*self.key, *self.local_columns, *self.rules, *(rule.by for rule in self.rules.values())}
        return frozenset(name for name in (*named, self.owner, self.inserts_by_owner) if name is not None)


@dataclass(frozen=True, slots=True)
class FileTree:
    """A tree of files.

    Attributes:
        kind: `config` goes from the master to the others; of a `spool` each node owns `tree`.
        root: the directory that names are relative to.
        setting: the key of node.toml's [files] that replaces `root`, "" when none does.
        include: patterns of names below `root`; a name that ends in "/" is a directory with all that is in it.
        exclude: patterns that are never synchronised; they win over `include`.
        tree: of a spool, the part that a node owns; "{cid}" stands for its CID.
    """

    kind: Literal["config", "spool"]
    root: str
    setting: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tree: str = ""


@dataclass(frozen=True, slots=True)
class Action:
    """A command to run.

    Attributes:
        run: program and arguments, no shell.
        files: run when one of these files was changed by synchronisation; absolute paths.
        tables: run when one of these tables was changed by synchronisation.
        role: run when this node takes that role: `master`, `node`, or "" for neither.
    """

    run: tuple[str, ...]
    files: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    role: Literal["", "master", "node"] = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """A whole profile.

    Attributes:
        all_tables: every table that is not named is mirrored.
        sequences: a snapshot carries the sequences' values.
        ddl: changes of the schema are carried too.
        cid0: (table, column) where `create` puts its own CID in place of 0; tables of schema public.
        services: stopped while the database is created or replaced.
        digest: SHA-256 of what the profile says, comments and layout aside; 64 hexadecimal digits.
    """

    name: str
    tables: tuple[TableRule, ...]
    all_tables: bool
    sequences: bool
    ddl: bool
    cid0: tuple[tuple[str, str], ...]
    services: tuple[str, ...]
    files: tuple[FileTree, ...]
    actions: tuple[Action, ...]
    digest: str

    @property
    def compares_times(self) -> bool:
        """True when some value is taken from the row that was changed last: then the nodes' clocks must agree."""
        return any(rule.kind == "latest" for table in self.tables for rule in table.rules.values())

    def rule_for(self, schema: str, table: str) -> TableRule | None:
        """Return what the profile says of a table, None when it is no concern of the profile's."""
        if schema.startswith("pg_") or schema in {"information_schema", OWN_SCHEMA}:
            return None
        for rule in self.tables:
            if rule.name == table and rule.schema == schema:
                return rule
        return TableRule(schema, table, Policy.MIRROR) if self.all_tables else None


def load_profile(name_or_path: str) -> Profile:
    """Return a profile: a shipped one by its name, any other by the path of its file.

    Raises:
        ConfigError: when there is none, or it says something that cannot be used; names file, key and expectation.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        path = Path(name_or_path)
    elif name_or_path in shipped:
        path = SHIPPED / f"{name_or_path}.toml"
    else:
        close = difflib.get_close_matches(name_or_path, shipped, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"shipped are {', '.join(shipped)}; or give a file's path"
        raise ConfigError(f"there is no profile {name_or_path!r:.100}", hint=hint)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the profile {path} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the profile {path} is not TOML ({error})") from error
    return _profile(path, data)


class _Section:
    """A table of the file: every key asked for is known, every other one is an error."""

    def __init__(self, path: Path, where: str, values: object) -> None:
        self.path, self.where = path, where
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {where} is {values!r:.60}, expected a table")
        self.values: dict[str, Any] = values
        self._known: list[str] = []

    def take(self, key: str, default: Any, expected: str, read: Callable[[Any], Any]) -> Any:
        """Return what `read` makes of a key's value; its ValueError becomes a sentence."""
        self._known.append(key)
        if key not in self.values:
            return default
        value = self.values[key]
        try:
            return read(value)
        except ValueError:
            raise ConfigError(f"{self.path}: {self.name(key)} is {value!r:.100}, expected {expected}") from None

    def name(self, key: str) -> str:
        """Return a key as messages name it."""
        return f"{self.where} {key}" if self.where else key

    def fail(self, key: str, problem: str, *, hint: str = "") -> ConfigError:
        """Return the error that a key has a problem."""
        return ConfigError(f"{self.path}: {self.name(key)} {problem}", hint=hint)

    def end(self) -> None:
        """Refuse what was not asked for."""
        for key in self.values:
            if key not in self._known:
                close = difflib.get_close_matches(key, self._known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(self._known)}"
                raise self.fail(key, "is not a key that pmgsync knows", hint=hint)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError
    found = tuple(map(_text, value))
    if len(set(found)) != len(found):
        raise ValueError
    return found


def _one_of(*allowed: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value not in allowed:
            raise ValueError
        return value

    return read


def _sections(path: Path, key: str, value: object) -> list[_Section]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: {key} is {value!r:.60}, expected [[{key}]]")
    return [_Section(path, f"[[{key}]] number {number}", entry) for number, entry in enumerate(value, 1)]


def _profile(path: Path, data: dict[str, Any]) -> Profile:
    top = _Section(path, "", data)
    names = "a list of different names"
    name = top.take("name", path.stem, "a name", _text)
    top.take("description", "", "a sentence", _text)
    all_tables = top.take("all_tables", False, "true or false", _flag)
    sequences = top.take("sequences", True, "true or false", _flag)
    ddl = top.take("ddl", False, "true or false", _flag)
    cid0 = tuple(map(_split_column, top.take("cid0", (), 'a list of "table.column"', _columns)))
    services = top.take("services", (), names, _texts)
    raw_tables = top.take("tables", {}, "tables [tables.NAME]", _table)
    raw_files = top.take("files", [], "[[files]]", _list)
    raw_actions = top.take("actions", [], "[[actions]]", _list)
    top.end()
    tables = tuple(_table_rule(path, key, value) for key, value in raw_tables.items())
    if not tables and not all_tables:
        raise ConfigError(f"{path}: tables is empty, expected at least one [tables.NAME], or all_tables = true")
    named: dict[tuple[str, str], TableRule] = {}
    for rule in tables:
        if named.setdefault((rule.schema, rule.name), rule) is not rule:
            raise ConfigError(f"{path}: the table {rule.schema}.{rule.name} stands twice in [tables]")
    for table, column in cid0:
        _known_table(top, "cid0", table, named, all_tables=all_tables)
        if (rule_of := named.get((DEFAULT_SCHEMA, table))) is not None and rule_of.policy is Policy.LOCAL:
            raise top.fail("cid0", f"names {table}.{column}, but the table is local")
    actions = tuple(map(_action, _sections(path, "actions", raw_actions)))
    for action in actions:
        for table in action.tables:
            _known_table(top, "actions", table, named, all_tables=all_tables)
    canonical = {key: value for key, value in data.items() if key != "description"} | {"name": name}
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return Profile(
        name=name,
        tables=tables,
        all_tables=all_tables,
        sequences=sequences,
        ddl=ddl,
        cid0=cid0,
        services=services,
        files=tuple(map(_file_tree, _sections(path, "files", raw_files))),
        actions=actions,
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def _known_table(
    top: _Section, key: str, table: str, named: Mapping[tuple[str, str], TableRule], *, all_tables: bool
) -> None:
    if (DEFAULT_SCHEMA, table) not in named and not all_tables:
        names = [name for schema, name in named if schema == DEFAULT_SCHEMA]
        close = difflib.get_close_matches(table, names, 1)
        raise top.fail(
            key,
            f"names the table {table!r}, which is not in [tables]",
            hint=f"did you mean {close[0]!r}?" if close else "",
        )


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


def _columns(value: Any) -> tuple[str, ...]:
    texts = _texts(value)
    for text in texts:
        _split_column(text)
    return texts


def _split_column(text: str) -> tuple[str, str]:
    table, dot, column = text.partition(".")
    if not table or not dot or not column:
        raise ValueError
    return table, column


def _table_rule(path: Path, key: str, value: object) -> TableRule:
    where = f"[tables.{key}]" if "." not in key else f'[tables."{key}"]'
    section = _Section(path, where, value)
    schema, dot, name = key.partition(".")
    if not dot:
        schema, name = DEFAULT_SCHEMA, key
    if not schema or not name:
        raise ConfigError(f'{path}: {where} is not a table\'s name, expected NAME or "SCHEMA.NAME"')
    if schema.startswith("pg_") or schema in {"information_schema", OWN_SCHEMA}:
        raise ConfigError(f"{path}: {where} is in the schema {schema}, which is never synchronised")
    policies = tuple(policy.value for policy in Policy)
    columns = "a list of different column names"
    policy_text = section.take("policy", "", f"one of {', '.join(policies)}", _one_of(*policies))
    if not policy_text:
        raise section.fail("policy", f"is missing, expected one of {', '.join(policies)}")
    policy = Policy(policy_text)
    columns_key = section.take("key", (), columns, _texts)
    local_columns = section.take("local_columns", (), columns, _texts)
    owner = section.take("owner", None, "a column's name", _text)
    deletes = section.take("deletes", True, "true or false", _flag)
    inserts_by = section.take("inserts_by_owner", None, "a column's name", _text)
    raw_rules = section.take("merge", {}, "a table of rules", _table)
    section.end()
    rules = {column: _merge_rule(path, f"{where} merge.{column}", rule) for column, rule in raw_rules.items()}
    _check_policy(section, policy)
    for column in rules:
        if column in columns_key:
            raise section.fail(f"merge.{column}", "is a rule for a column of the key, which never changes")
    for column in local_columns:
        if column in {*columns_key, *rules, owner, inserts_by}:
            raise section.fail("local_columns", f"names {column}, which the other keys rely on")
    return TableRule(
        schema, name, policy, columns_key, owner, frozenset(local_columns), rules, deletes, inserts_by
    )  # fmt: skip


_NEEDED = {Policy.OWNED: ("owner",), Policy.MERGE: ("merge",)}
_ALLOWED = {
    Policy.MIRROR: {"key", "local_columns"},
    Policy.OWNED: {"key", "local_columns", "owner"},
    Policy.MERGE: {"key", "local_columns", "merge", "deletes", "inserts_by_owner"},
    Policy.LOCAL: set(),
}


def _check_policy(section: _Section, policy: Policy) -> None:
    for key in _NEEDED.get(policy, ()):
        if not section.values.get(key):
            raise section.fail(key, f"is missing, expected with policy = {policy.value!r}")
    for key in section.values:
        if key != "policy" and key not in _ALLOWED[policy]:
            raise section.fail(key, f"has no meaning with policy = {policy.value!r}")


def _merge_rule(path: Path, where: str, value: object) -> MergeRule:
    """Return a rule; `"greatest"` is short for `{ rule = "greatest" }`."""
    section = _Section(path, where, {"rule": value} if isinstance(value, str) else value)
    kind = section.take("rule", "", f"one of {', '.join(_KINDS)}", _one_of(*_KINDS))
    if not kind:
        raise section.fail("rule", f"is missing, expected one of {', '.join(_KINDS)}")
    by = section.take("by", None, "a column's name", _text)
    order = section.take("order", (), "a list of different values", _texts)
    tie = section.take("tie", None, "a value", _text)
    section.end()
    for key, given, wanted in (("by", by, "latest"), ("order", order, "advance")):
        if kind == wanted and not given:
            raise section.fail(key, f"is missing, expected with the rule {wanted!r}")
        if kind != wanted and given:
            raise section.fail(key, f"has no meaning with the rule {kind!r}")
    if kind == "advance" and len(order) < 2:
        raise section.fail("order", "has one value, expected at least two")
    if tie is not None and kind != "latest":
        raise section.fail("tie", f"has no meaning with the rule {kind!r}")
    return MergeRule(kind, by, order, tie)


def _file_tree(section: _Section) -> FileTree:
    patterns = "a list of different patterns relative to root"
    kind = section.take("kind", "", 'one of "config", "spool"', _one_of("config", "spool"))
    if not kind:
        raise section.fail("kind", 'is missing, expected one of "config", "spool"')
    root = section.take("root", "", "an absolute path", _absolute)
    if not root:
        raise section.fail("root", "is missing, expected an absolute path")
    setting = section.take("setting", "", '"config_root" or "spool_root"', _one_of("config_root", "spool_root"))
    include = section.take("include", (), patterns, _relative)
    exclude = section.take("exclude", (), patterns, _relative)
    tree = section.take("tree", "", 'a path below root with "{cid}" in it', _cid_tree)
    section.end()
    if (kind == "spool") != bool(tree):
        raise section.fail("tree", f"is {'missing' if not tree else 'given'}, expected for a spool and nothing else")
    if kind == "config" and not include:
        raise section.fail("include", f"is missing, expected {patterns}")
    return FileTree(kind, root, setting, include, exclude, tree)


def _action(section: _Section) -> Action:
    run = section.take("run", (), "a list: a program and its arguments", _command)
    if not run:
        raise section.fail("run", "is missing, expected a list: a program and its arguments")
    files = section.take("files", (), "a list of absolute paths", _absolutes)
    tables = section.take("tables", (), "a list of tables", _texts)
    role = section.take("role", "", '"master" or "node"', _one_of("master", "node"))
    section.end()
    if not files and not tables and not role:
        raise section.fail("files", "is missing, expected one of files, tables, role: an action needs an occasion")
    return Action(run, files, tables, role)


def _command(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError
    return tuple(map(_text, value))


def _absolute(value: Any) -> str:
    if not Path(_text(value)).is_absolute():
        raise ValueError
    return str(value)


def _absolutes(value: Any) -> tuple[str, ...]:
    return _each(value, _absolute)


def _relative(value: Any) -> tuple[str, ...]:
    return _each(value, _below)


def _each(value: Any, check: Callable[[Any], Any]) -> tuple[str, ...]:
    texts = _texts(value)
    for text in texts:
        check(text)
    return texts


def _below(value: Any) -> str:
    """A name that cannot leave the root."""
    path = Path(_text(value))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError
    return str(value)


def _cid_tree(value: Any) -> str:
    if "{cid}" not in _below(value):
        raise ValueError
    return str(value)
