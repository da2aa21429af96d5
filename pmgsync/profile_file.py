"""A profile's file: TOML, read and checked into the values of `pmgsync.core.profile`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pmgsync.core.profile import (
    DEFAULT_SCHEMA,
    IN_BACKUP,
    RULE_KINDS,
    Action,
    FileTree,
    Gateway,
    MergeRule,
    Policy,
    Profile,
    TableRule,
    is_reserved_schema,
)
from pmgsync.errors import ConfigError
from pmgsync.toml_section import (
    Section,
    as_absolute,
    as_flag,
    as_list,
    as_table,
    as_text,
    as_texts,
    did_you_mean,
    each,
    one_of,
    read_toml,
)

SHIPPED = Path(__file__).parent / "profiles"


_COLUMNS = "a list of different column names"
_FLAG = "true or false"
_FILE_KINDS: tuple[Literal["config", "spool"], ...] = ("config", "spool")
_ROLES: tuple[Literal["master", "node"], ...] = ("master", "node")


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
        hint = did_you_mean(name_or_path, shipped) or f"shipped are {', '.join(shipped)}; or give a file's path"
        raise ConfigError(f"there is no profile {name_or_path!r:.100}", hint=hint)
    return _profile(read_toml(path, "the profile"))


def _profile(top: Section) -> Profile:
    name = top.take("name", top.path.stem, "a name", as_text)
    top.take("description", "", "a sentence", as_text)
    all_tables = top.take("all_tables", False, _FLAG, as_flag)
    sequences = top.take("sequences", True, _FLAG, as_flag)
    ddl = top.take("ddl", False, _FLAG, as_flag)
    cid0 = top.take("cid0", (), 'a list of "table.column"', _table_columns)
    services = top.take("services", (), "a list of different names", as_texts)
    raw_tables = top.take("tables", {}, "tables [tables.NAME]", as_table)
    gateway = _gateway(top.section("gateway"))
    files, actions = top.sections("files"), top.sections("actions")
    top.end()
    tables = tuple(_table_rule(top.path, key, value) for key, value in raw_tables.items())
    if not tables and not all_tables:
        raise top.fail("tables", "is empty, expected at least one [tables.NAME], or all_tables = true")
    named: dict[tuple[str, str], TableRule] = {}
    for rule in tables:
        if named.setdefault((rule.schema, rule.name), rule) is not rule:
            raise ConfigError(f"{top.path}: the table {rule.schema}.{rule.name} stands twice in [tables]")
    for table, column in cid0:
        _check_table(top, "cid0", table, named, all_tables=all_tables)
        if (rule_of := named.get((DEFAULT_SCHEMA, table))) is not None and rule_of.policy is Policy.LOCAL:
            raise top.fail("cid0", f"names {table}.{column}, but the table is local")
    profile = Profile(
        name=name,
        tables=tables,
        all_tables=all_tables,
        sequences=sequences,
        ddl=ddl,
        cid0=cid0,
        services=services,
        files=tuple(map(_file_tree, files)),
        actions=tuple(map(_action, actions)),
        digest=_digest(name, top.values),
        gateway=gateway,
    )
    for action in profile.actions:
        for table in action.tables:
            _check_table(top, "actions", table, named, all_tables=all_tables)
    for tree in profile.files:
        for table, _ in tree.named_in:
            _check_table(top, "named_in", table, named, all_tables=all_tables)
    return profile


def _digest(name: str, values: Mapping[str, Any]) -> str:
    said = {key: value for key, value in values.items() if key != "description"} | {"name": name}
    if "tables" in said:
        # What a backup has is no concern of the other nodes.
        said["tables"] = {
            key: {each: value for each, value in rule.items() if each != "backup"}
            for key, rule in said["tables"].items()
        }
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_table(
    top: Section, key: str, table: str, named: Mapping[tuple[str, str], TableRule], *, all_tables: bool
) -> None:
    if (DEFAULT_SCHEMA, table) not in named and not all_tables:
        hint = did_you_mean(table, [name for schema, name in named if schema == DEFAULT_SCHEMA])
        raise top.fail(key, f"names the table {table!r}, which is not in [tables]", hint=hint)


def _table_columns(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple(map(_table_column, as_texts(value)))


def _table_column(text: str) -> tuple[str, str]:
    table, dot, column = text.partition(".")
    if not table or not dot or not column:
        raise ValueError
    return table, column


def _table_rule(path: Path, key: str, value: object) -> TableRule:
    where = f"[tables.{key}]" if "." not in key else f'[tables."{key}"]'
    section = Section(path, where, value)
    schema, dot, name = key.partition(".")
    if not dot:
        schema, name = DEFAULT_SCHEMA, key
    if not schema or not name:
        raise ConfigError(f'{path}: {where} is not a table\'s name, expected NAME or "SCHEMA.NAME"')
    if is_reserved_schema(schema):
        raise ConfigError(f"{path}: {where} is in the schema {schema}, which is never synchronised")
    policies = tuple(policy.value for policy in Policy)
    policy = Policy(section.require("policy", f"one of {', '.join(policies)}", one_of(*policies)))
    key_columns = section.take("key", (), _COLUMNS, as_texts)
    local_columns = section.take("local_columns", (), _COLUMNS, as_texts)
    owner = section.take("owner", None, "a column's name", as_text)
    deletes = section.take("deletes", True, _FLAG, as_flag)
    inserts_by = section.take("inserts_by_owner", None, "a column's name", as_text)
    dated_by = section.take("dated_by", None, "a column's name", as_text)
    backup = section.take("backup", IN_BACKUP[0], f"one of {', '.join(IN_BACKUP)}", one_of(*IN_BACKUP))
    raw_rules = section.take("merge", {}, "a table of rules", as_table)
    section.end()
    rules = {column: _merge_rule(path, f"{where} merge.{column}", rule) for column, rule in raw_rules.items()}
    _check_policy(section, policy)
    for column in rules:
        if column in key_columns:
            raise section.fail(f"merge.{column}", "is a rule for a column of the key, which never changes")
    for column in local_columns:
        if column in {*key_columns, *rules, owner, inserts_by}:
            raise section.fail("local_columns", f"names {column}, which the other keys rely on")
    return TableRule(
        schema, name, policy, key_columns, owner, frozenset(local_columns), rules, deletes, inserts_by, dated_by, backup
    )  # fmt: skip


_NEEDED = {Policy.OWNED: ("owner",), Policy.MERGE: ("merge",)}
_ALLOWED = {
    Policy.MIRROR: {"key", "local_columns", "backup"},
    Policy.OWNED: {"key", "local_columns", "owner", "dated_by", "backup"},
    Policy.MERGE: {"key", "local_columns", "merge", "deletes", "inserts_by_owner", "backup"},
    Policy.LOCAL: set(),
}


def _check_policy(section: Section, policy: Policy) -> None:
    for key in _NEEDED.get(policy, ()):
        if not section.values.get(key):
            raise section.fail(key, f"is missing, expected with policy = {policy.value!r}")
    for key in section.values:
        if key != "policy" and key not in _ALLOWED[policy]:
            raise section.fail(key, f"has no meaning with policy = {policy.value!r}")


def _merge_rule(path: Path, where: str, value: object) -> MergeRule:
    """Return a rule; `"greatest"` is short for `{ rule = "greatest" }`."""
    section = Section(path, where, {"rule": value} if isinstance(value, str) else value)
    kind = section.require("rule", f"one of {', '.join(RULE_KINDS)}", one_of(*RULE_KINDS))
    by = section.take("by", None, "a column's name", as_text)
    order = section.take("order", (), "a list of different values", as_texts)
    tie = section.take("tie", None, "a value", as_text)
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


def _gateway(section: Section) -> Gateway:
    paths = {
        key: section.take(key, "", "an absolute path", as_absolute)
        for key in ("cluster_conf", "certificate", "host_key", "root_key")
    }
    section.end()
    return Gateway(**paths)


def _file_tree(section: Section) -> FileTree:
    patterns = "a list of different patterns relative to root"
    kind = section.require("kind", 'one of "config", "spool"', one_of(*_FILE_KINDS))
    root = section.require("root", "an absolute path", as_absolute)
    setting = section.take("setting", "", '"config_root" or "spool_root"', one_of("config_root", "spool_root"))
    include = section.take("include", (), patterns, each(_below))
    exclude = section.take("exclude", (), patterns, each(_below))
    tree = section.take("tree", "", 'a path below root with "{cid}" in it', _cid_tree)
    limits = FileTree(kind, root)
    max_size = section.take("max_size", limits.max_size, "a number of bytes", _count)
    max_files = section.take("max_files", limits.max_files, "a number of files", _count)
    named_in = section.take("named_in", (), 'a list of "table.column"', _table_columns)
    section.end()
    if (kind == "spool") != bool(tree):
        raise section.fail("tree", f"is {'missing' if not tree else 'given'}, expected for a spool and nothing else")
    if kind == "config" and not include:
        raise section.fail("include", f"is missing, expected {patterns}")
    if kind == "config" and named_in:
        raise section.fail("named_in", "is given, expected for a spool and nothing else")
    return FileTree(kind, root, setting, include, exclude, tree, max_size, max_files, named_in)


def _count(value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError
    return value


def _action(section: Section) -> Action:
    run = section.require("run", "a list: a program and its arguments", _command)
    files = section.take("files", (), "a list of absolute paths", each(as_absolute))
    tables = section.take("tables", (), "a list of tables", as_texts)
    role: Literal["", "master", "node"] = section.take("role", "", '"master" or "node"', one_of(*_ROLES))
    section.end()
    if not files and not tables and not role:
        raise section.fail("files", "is missing, expected one of files, tables, role: an action needs an occasion")
    return Action(run, files, tables, role)


def _command(value: Any) -> tuple[str, ...]:
    words = tuple(map(as_text, as_list(value)))
    if not words:
        raise ValueError
    return words


def _below(value: Any) -> str:
    """Return a name that cannot leave the root."""
    path = PurePosixPath(as_text(value))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError
    return str(value)


def _cid_tree(value: Any) -> str:
    if "{cid}" not in _below(value):
        raise ValueError
    return str(value)
