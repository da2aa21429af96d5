"""Profiles: which tables and files are synchronised, and how. Plain values; `pmgsync.profile_file` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

OWN_SCHEMA = "pmgsync"
"""The database schema of pmgsync's own state; mind the letters, they are not those of the package."""
DEFAULT_SCHEMA = "public"

RuleKind = Literal["greatest", "least", "latest", "advance"]
RULE_KINDS: tuple[RuleKind, ...] = ("greatest", "least", "latest", "advance")

InBackup = Literal["always", "statistics", "never"]
IN_BACKUP: tuple[InBackup, ...] = ("always", "statistics", "never")


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
        dated_by: owned tables: the column with a row's date, a timestamp or seconds since 1970; for messages only.
        backup: whether a backup has the table: `statistics` only when it is asked for them.
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
    dated_by: str | None = None
    backup: InBackup = "always"

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
        max_size: bytes of one file; a larger one is left out, with a finding.
        max_files: of files and directories; a tree with more stops.
        named_in: of a spool, (table, column) of schema public whose rows name a file by its path below `root`.
    """

    kind: Literal["config", "spool"]
    root: str
    setting: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tree: str = ""
    max_size: int = 16 << 30
    max_files: int = 1_000_000
    named_in: tuple[tuple[str, str], ...] = ()


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
class Gateway:
    """Where the gateway's own daemons have their files; "" for one that there is not.

    Attributes:
        cluster_conf: written for them, with the members and their keys in it.
        certificate: of the API, PEM.
        host_key, root_key: public RSA keys in OpenSSH's format.
    """

    cluster_conf: str = ""
    certificate: str = ""
    host_key: str = ""
    root_key: str = ""


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
    gateway: Gateway = Gateway()

    @property
    def compares_times(self) -> bool:
        """True when some value is taken from the row that was changed last: then the nodes' clocks must agree."""
        return any(rule.kind == "latest" for table in self.tables for rule in table.rules.values())

    def rule_for(self, schema: str, table: str) -> TableRule | None:
        """Return what the profile says of a table, None when it is no concern of the profile's."""
        if is_reserved_schema(schema):
            return None
        for rule in self.tables:
            if rule.name == table and rule.schema == schema:
                return rule
        return TableRule(schema, table, Policy.MIRROR) if self.all_tables else None


def is_reserved_schema(schema: str) -> bool:
    """True of the schemas that are never synchronised: the server's own and that of pmgsync's state."""
    return schema.startswith("pg_") or schema in {"information_schema", OWN_SCHEMA}
