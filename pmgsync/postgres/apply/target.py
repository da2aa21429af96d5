"""Targets: what the local catalog says of a table that an origin describes, and which column goes where."""

from __future__ import annotations

from dataclasses import dataclass, field

from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.merging import groups
from pmgsync.core.pgoutput import Relation
from pmgsync.core.profile import Policy, TableRule
from pmgsync.errors import ApplyError, ConfigError
from pmgsync.postgres.session import quote_ident, quote_literal, rows


@dataclass(frozen=True, slots=True)
class LocalColumn:
    """A column of a local table.

    Attributes:
        name: quoted.
        type_name: as PREPARE wants it, without a modifier.
        identity: "" none, "a" GENERATED ALWAYS, "d" BY DEFAULT.
        equals: the equality operator of an index that has this column, None when no index does.
        collatable: a collation decides how values sort.
        type_oid, typmod: its type and that one's modifier.
        required: NOT NULL and without a default.
        in_arrays: an array of its values, taken apart by unnest, gives the same values: it is no array or composite
            itself, and a comma separates values of its type.
    """

    name: bytes
    type_name: bytes
    type_oid: int
    typmod: int
    not_null: bool
    identity: str
    generated: bool
    equals: bytes | None
    collatable: bool
    required: bool
    in_arrays: bool


@dataclass(eq=False, slots=True)
class Target:
    """A local table beside the relation that it is written from. Places are those of the origin's columns.

    Attributes:
        number: distinguishes targets in the names of prepared statements.
        name: qualified and quoted.
        only: "ONLY " unless the table is partitioned: rows of inheriting tables are another table's.
        columns: place -> local column, of all columns that are written and compared.
        derived: place -> local column, of the columns of the key that are generated here: compared, never written.
        key: the places of the replica identity; () under REPLICA IDENTITY FULL.
        full: rows are found by all their values.
        indexed: the places that an index can find rows by.
        arbiter: the places of a unique index that INSERT ... ON CONFLICT can name, () when there is none.
        rest: writable local columns that the origin does not have, or that are the node's own.
        lacking: columns of the origin's that this table does not have, so it is looked up again next time.
        differs: the type of a column may be another than the origin's. OIDs say so for built-in types only.
        strict: a row that is not there is a divergence, not a local purge.
        always: one of the columns is GENERATED ALWAYS AS IDENTITY.
        fires: a trigger or rule does something here when a change is applied, and may see in which order.
        folds: no constraint but the key compares rows, so that nobody sees the values between two changes of a row.
        merges: rows are merged, column by column.
        copies: rows can be inserted by COPY, whatever was inserted with them.
        as_sets: updates and deletes of many rows can be one statement: a unique index finds each by its key.
        merges_sets: merges of many rows of different keys can be one statement.
        prepared: what an executor has prepared for this target.
    """

    number: int
    oid: int
    name: bytes
    only: bytes
    partitioned: bool
    relation: Relation
    rule: TableRule
    columns: dict[int, LocalColumn]
    derived: dict[int, LocalColumn]
    key: tuple[int, ...]
    full: bool
    indexed: tuple[int, ...]
    arbiter: tuple[int, ...]
    rest: tuple[LocalColumn, ...]
    warnings: tuple[str, ...]
    lacking: tuple[bytes, ...]
    fires: bool
    folds: bool
    merges: bool = field(init=False)
    copies: bool = field(init=False)
    as_sets: bool = field(init=False)
    merges_sets: bool = field(init=False)
    differs: bool = field(init=False)
    strict: bool = field(init=False)
    always: bool = field(init=False)
    prepared: dict[object, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.strict = self.rule.policy is Policy.MIRROR
        self.always = any(column.identity == "a" for column in self.columns.values())
        self.merges = self.rule.policy is Policy.MERGE
        self.copies = bool(self.columns) and not self.fires and not self.merges
        self.as_sets = bool(self.arbiter) and not self.derived and not self.full and not self.fires and all(
            place in self.columns and self.columns[place].in_arrays and self.columns[place].equals is not None
            for place in self.key
        ) and not self.merges  # fmt: skip
        self.merges_sets = self.merges and not self.fires and self._keys_tell(
            [self.columns[place] for place in self.key]
        ) and all(column.in_arrays for column in self.columns.values())  # fmt: skip
        known = self.columns | self.derived
        pairs = [(self.relation.columns[place], column) for place, column in known.items()]
        self.differs = any(
            (theirs.type_oid, theirs.typmod) != (mine.type_oid, mine.typmod) or mine.type_oid >= FIRST_USER_OID
            for theirs, mine in pairs
        )

    def _keys_tell(self, key: list[LocalColumn]) -> bool:
        """Return True when keys of other texts are other keys, or a unique index says that they are not, and an index
        finds them."""
        return (
            all(column.not_null for column in key)
            and any(column.equals is not None for column in key)
            and (bool(self.arbiter) or all(c.equals is None or c.type_oid in _OF_ONE_TEXT for c in key))
        )

    def column(self, place: int) -> LocalColumn:
        """Return a column that is written or belongs to the key."""
        return self.columns[place] if place in self.columns else self.derived[place]


FIRST_USER_OID = 16384
_OF_ONE_TEXT = frozenset({16, 17, 18, 20, 21, 23, 26, 1082, 1114, 1184, 2950})
"""Types of which two values are equal only when their texts are: boolean, bytea, "char", integers, times, uuid. Not
numeric (1.0 and 1.00), nor character(n), nor text under some collations."""

# What is defined on partitions is seen by whoever writes to the whole. In replica role only those triggers and rules
# fire that are ALWAYS or REPLICA.
_TABLE = b"""
SELECT c.oid::int8, c.relkind::text,
       EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgenabled IN ('A', 'R') AND NOT t.tgisinternal
               AND (t.tgrelid = c.oid OR t.tgrelid IN (SELECT p.relid FROM pg_catalog.pg_partition_tree(c.oid) AS p)))
       OR EXISTS (SELECT FROM pg_catalog.pg_rewrite AS r WHERE r.ev_class = c.oid AND r.ev_enabled IN ('A', 'R')),
       c.relkind = 'r' AND (SELECT pg_catalog.count(*) FROM pg_catalog.pg_index AS i
                            WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion)) <= 1
FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s"""

_COLUMNS = b"""
SELECT a.attname, pg_catalog.format_type(a.atttypid, -1), a.attnotnull, a.attidentity::text, a.attgenerated::text,
       a.attcollation <> 0, a.attnum::int4, a.atttypid::int8, a.atttypmod,
       a.attnotnull AND NOT a.atthasdef AND a.attidentity = '',
       y.typcategory NOT IN ('A', 'C', 'P') AND y.typdelim = ',' AND y.typarray <> 0
FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_type AS y ON y.oid = a.atttypid
WHERE a.attrelid = %d AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"""

# One row a column of an index; attnum 0 is an expression. An index serves as arbiter and for `=` when it has no
# predicate and is valid; a deferrable one serves for `=` only.
_INDEXES = b"""
SELECT i.indexrelid::int8, k.attnum::int4, i.indisunique AND i.indimmediate AND k.whole, i.indisprimary,
       CASE WHEN o.oid IS NOT NULL
            THEN 'OPERATOR(' || pg_catalog.quote_ident(n.nspname) || '.' || o.oprname || ')' END
FROM pg_catalog.pg_index AS i
CROSS JOIN LATERAL (
    SELECT p.attnum, p.place, pg_catalog.bool_and(p.attnum <> 0) OVER () AS whole
    FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS p (attnum, place)
    WHERE p.place <= i.indnkeyatts) AS k
JOIN pg_catalog.pg_opclass AS c ON c.oid = i.indclass[k.place - 1]
JOIN pg_catalog.pg_am AS m ON m.oid = c.opcmethod AND m.amname = 'btree'
LEFT JOIN pg_catalog.pg_amop AS a ON a.amopfamily = c.opcfamily AND a.amopstrategy = 3
      AND a.amoplefttype = c.opcintype AND a.amoprighttype = c.opcintype
LEFT JOIN pg_catalog.pg_operator AS o ON o.oid = a.amopopr
LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid = o.oprnamespace
WHERE i.indrelid = %d AND i.indisvalid AND i.indpred IS NULL
ORDER BY i.indisprimary DESC, i.indexrelid, k.place"""


def load_target(cursor: Cursor, relation: Relation, rule: TableRule, number: int) -> Target:
    """Look a relation up by its name in the local catalog.

    Raises:
        ApplyError: when there is no such table, or rows of it could not be found.
        psycopg2.Error: when the server does not answer.
    """
    name = quote_ident(relation.namespace) + b"." + quote_ident(relation.name)
    cursor.execute(_TABLE % (quote_literal(relation.namespace), quote_literal(relation.name)))
    found = rows(cursor)
    if not found:
        raise ApplyError(
            f"table {relation.qualified} does not exist here",
            table=relation.qualified,
            sqlstate="42P01",
            hint="create it as it is on the origin",
        )
    oid, kind = int(found[0][0] or b"0"), found[0][1]
    fires, folds = (value == b"t" for value in found[0][2:])
    if kind not in {b"r", b"p"}:
        raise ApplyError(
            f"{relation.qualified} is not a table here", table=relation.qualified, sqlstate="42809",
            hint="create it as it is on the origin",
        )  # fmt: skip
    cursor.execute(_COLUMNS % oid)
    column_rows = rows(cursor)
    cursor.execute(_INDEXES % oid)
    equals, indexes = _indexes(rows(cursor))
    local: dict[bytes, LocalColumn] = {}
    places: dict[int, bytes] = {}
    for row in column_rows:
        attname, type_name, not_null, identity, generated, collatable, attnum, type_oid, typmod, required, arrays = row
        assert attname is not None and type_name is not None and attnum is not None
        assert type_oid is not None and typmod is not None
        number_here = int(attnum)
        places[number_here] = attname
        local[attname] = LocalColumn(
            quote_ident(attname), type_name, int(type_oid), int(typmod), not_null == b"t", (identity or b"").decode(),
            bool(generated), equals.get(number_here), collatable == b"t", required == b"t",
            arrays == b"t",
        )  # fmt: skip
    return _match(relation, rule, number, oid, name, kind == b"p", local, places, indexes, fires, folds)


def _indexes(found: list[tuple[bytes | None, ...]]) -> tuple[dict[int, bytes], list[tuple[bool, list[int]]]]:
    """Return the equality operator of each indexed column, and of each index whether it is an arbiter and its
    columns."""
    equals: dict[int, bytes] = {}
    indexes: dict[bytes, tuple[bool, list[int]]] = {}
    for index, attnum, unique, _, operator in found:
        assert index is not None and attnum is not None
        number = int(attnum)
        indexes.setdefault(index, (unique == b"t", []))[1].append(number)
        if number and operator is not None:
            equals.setdefault(number, operator)
    return equals, list(indexes.values())


def _match(
    relation: Relation, rule: TableRule, number: int, oid: int, name: bytes, partitioned: bool,
    local: dict[bytes, LocalColumn], places: dict[int, bytes], indexes: list[tuple[bool, list[int]]],
    fires: bool, folds: bool,
) -> Target:  # fmt: skip
    own = {column.encode() for column in rule.local_columns}
    columns: dict[int, LocalColumn] = {}
    generated: dict[int, LocalColumn] = {}
    by_name: dict[bytes, int] = {}
    warnings: list[str] = []
    missing: list[bytes] = []
    for place, column in enumerate(relation.columns):
        here = local.get(column.name)
        if column.name in own:
            continue
        if here is None:
            missing.append(column.name)
            text = column.name.decode(errors="backslashreplace")
            warnings.append(f"{relation.qualified} has no column {text!r} here: its values from the origin are dropped")
        elif here.generated:
            generated[place] = here
        else:
            columns[place] = here
            by_name[column.name] = place
    full = relation.identity == "f"
    key = () if full else tuple(place for place, column in enumerate(relation.columns) if column.key)
    if rule.policy is Policy.MERGE:
        named = tuple(by_name.get(column.encode(), -1) for column in rule.key)
        key, full = named or key or _first_arbiter(indexes, places, by_name, ()), False
    # From 18 on a replica identity may have stored generated columns.
    derived = {place: generated[place] for place in key if place in generated}
    if rule.policy is Policy.MERGE and derived:
        raise ApplyError(
            f"table {relation.qualified} is merged by a key with a generated column", table=relation.qualified,
            sqlstate="42703", hint="name a key of other columns in the profile",
        )  # fmt: skip
    lacking = [place for place in key if place not in columns and place not in derived]
    if lacking:
        raise ApplyError(
            f"table {relation.qualified} lacks a column of its key here", table=relation.qualified, sqlstate="42703",
            hint="bring the table into agreement with the origin's",
        )  # fmt: skip
    by_key = by_name | {relation.columns[place].name: place for place in derived}
    if rule.policy is Policy.MERGE:
        try:
            groups(rule.rules, [n.decode(errors="surrogateescape") for n, place in by_name.items() if place not in key])
        except ConfigError as error:
            raise ApplyError(
                f"table {relation.qualified} cannot be merged: {error.message}", table=relation.qualified,
                sqlstate="42703", hint="bring the table into agreement with the origin's",
            ) from error  # fmt: skip
    indexed = tuple(place for place, column in columns.items() if column.equals is not None) if full else ()
    return Target(
        number=number,
        oid=oid,
        name=name,
        only=b"" if partitioned else b"ONLY ",
        partitioned=partitioned,
        relation=relation,
        rule=rule,
        columns=columns,
        derived=derived,
        key=key,
        full=full,
        indexed=indexed,
        arbiter=_first_arbiter(indexes, places, by_key, key),
        rest=tuple(c for n, c in local.items() if n not in by_name and not c.generated),
        warnings=tuple(warnings),
        lacking=tuple(missing),
        fires=fires,
        folds=folds,
    )


def _first_arbiter(
    indexes: list[tuple[bool, list[int]]], places: dict[int, bytes], by_name: dict[bytes, int], key: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the columns of the first unique index (the primary key comes first) that the origin has all values of;
    with a key only one of exactly these columns."""
    for unique, numbers in indexes:
        found = tuple(by_name.get(places.get(number, b""), -1) for number in numbers)
        if unique and -1 not in found and (not key or set(found) == set(key)):
            return found
    return ()
