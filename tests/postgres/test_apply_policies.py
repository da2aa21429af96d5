"""Owned and merged tables on a real server: who may write which row, and how two values become one."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.merging import merge_rows
from pmgsync.core.positions import LAST, Position
from pmgsync.core.profile import MergeRule, Policy
from pmgsync.profile_file import load_profile
from tests.harness.apply_pairs import MakePair
from tests.harness.server import Pair, make_profile, rule

pytestmark = pytest.mark.cluster

OWNED = make_profile(rule("o", Policy.OWNED, owner="cid", local_columns=frozenset({"id"})), rule("l", Policy.LOCAL))
SCHEMA = (
    "CREATE TABLE o (cid int, rid int, id serial UNIQUE, v text, PRIMARY KEY (cid, rid)); "
    "CREATE TABLE m (id int PRIMARY KEY);"
    "CREATE TABLE l (id int PRIMARY KEY)"
)
ROWS = "INSERT INTO o (cid, rid, v) SELECT c, r, 'v' FROM generate_series(1, 4) c, generate_series(1, 10) r"


def owners(pair: Pair) -> list[tuple[object, ...]]:
    return pair.run("SELECT cid, count(*)::int FROM o GROUP BY 1 ORDER BY 1", on=pair.target)


def test_an_owned_row_is_found_by_a_generated_key(make_pair: MakePair, server: EmbeddedPostgres) -> None:
    if server.version < 18:
        pytest.skip("generated columns are published from PostgreSQL 18 on")
    pair = make_pair(
        "CREATE TABLE g (cid int, rid int, k int GENERATED ALWAYS AS (cid * 1000 + rid) STORED, v text, "
        "PRIMARY KEY (cid, k))",
        make_profile(rule("g", Policy.OWNED, owner="cid")),
        origin=2,
    )
    pair.run("ALTER PUBLICATION pmgsync SET (publish_generated_columns = stored)")
    pair.run("INSERT INTO g (cid, rid, v) VALUES (2, 3, 'was here')", on=pair.target)
    applier = pair.both("INSERT INTO g (cid, rid, v) SELECT 2, r, 'v' FROM generate_series(1, 20) AS r")
    assert applier.stats.conflicts == 1
    pair.both(
        "UPDATE g SET v = 'w' WHERE rid < 5; UPDATE g SET rid = rid + 100 WHERE rid % 2 = 0; "
        "DELETE FROM g WHERE k > 2110"
    )
    assert pair.run("SELECT max(k), count(*)::int FROM g", on=pair.target) == [(2110, 15)]


def test_only_the_owners_changes_count(make_pair: MakePair) -> None:
    pair = make_pair(SCHEMA, OWNED, origin=2)
    pair.run(f"{ROWS}; INSERT INTO m VALUES (1); INSERT INTO l VALUES (1)")
    applier = pair.apply()
    assert owners(pair) == [(2, 10)]
    assert applier.stats.skipped == 32 and pair.table("m", on=pair.target) == pair.table("l", on=pair.target) == []
    pair.run("UPDATE o SET v = 'w'; DELETE FROM o WHERE rid > 8")
    pair.apply()
    assert pair.run("SELECT DISTINCT cid, v FROM o", on=pair.target) == [(2, b"w")] and owners(pair) == [(2, 8)]


def test_the_master_answers_for_nodes_that_are_gone(make_pair: MakePair) -> None:
    pair = make_pair(SCHEMA, OWNED, origin=1)
    pair.run(ROWS)
    pair.apply()
    assert owners(pair) == [(1, 10), (4, 10)]  # 4 is not a member
    pair.run("INSERT INTO o (cid, rid) VALUES (2, 1), (3, 1)", on=pair.target)
    pair.run("TRUNCATE o")
    pair.apply()
    assert owners(pair) == [(2, 1), (3, 1)]


def test_rows_that_change_hands(make_pair: MakePair) -> None:
    pair = make_pair(SCHEMA, OWNED, origin=2)
    pair.run(ROWS)
    pair.apply()
    pair.run(
        "UPDATE o SET cid = 3, rid = rid + 100 WHERE cid = 2 AND rid < 4; "
        "UPDATE o SET cid = 2, rid = rid + 100 WHERE cid = 1 AND rid < 3"
    )
    pair.apply()
    assert pair.run("SELECT array_agg(rid ORDER BY rid)::text FROM o", on=pair.target) == [
        (b"{4,5,6,7,8,9,10,101,102}",)
    ]


def test_what_was_purged_here_is_not_missed(make_pair: MakePair) -> None:
    pair = make_pair(SCHEMA, OWNED, origin=2)
    pair.run(ROWS)
    pair.apply()
    pair.run(
        "DELETE FROM o WHERE rid < 4; UPDATE o SET v = 'here' WHERE rid = 9; INSERT INTO o VALUES (2, 50, 999, 'here')",
        on=pair.target,
    )
    pair.run(
        "DELETE FROM o WHERE cid = 2 AND rid = 1; UPDATE o SET v = 'x' WHERE rid IN (2, 5, 9); "
        "INSERT INTO o VALUES (2, 50, 5000, 'there')"
    )
    applier = pair.apply()
    assert (applier.stats.missing, applier.stats.conflicts) == (2, 1)
    assert pair.run("SELECT rid, v FROM o WHERE v <> 'v' ORDER BY 1", on=pair.target) == [
        (5, b"x"),
        (9, b"x"),
        (50, b"there"),
    ]
    assert pair.run("SELECT id FROM o WHERE rid = 50", on=pair.target) == [(999,)]  # the node's own number stays
    assert len(pair.run("SELECT * FROM pmgsync.conflict", on=pair.target)) == 1


def test_a_part_is_repeated_row_by_row(make_pair: MakePair) -> None:
    """Parts before it stay, its own rows meet what is here, and the whole is still one transaction."""
    pair = make_pair(SCHEMA, OWNED, origin=2)
    pair.run("INSERT INTO o (cid, rid, v) VALUES (2, 150, 'here')", on=pair.target)
    pair.run("INSERT INTO o (cid, rid, v) SELECT 2, g, repeat('v', 90) FROM generate_series(1, 300) g")
    messages = pair.messages()
    pair.again(Position(0, LAST), frame_bytes=3000)
    frames = pair.frames(messages)
    with pair.applier() as applier:
        for frame in frames[:-1]:
            applier.apply([frame])
        assert owners(pair) == [(2, 1)] and applier.stats.repeats == 1
        applier.apply(frames[-1:])
        assert (applier.stats.rows, applier.stats.conflicts) == (300, 1)
    columns = "cid, rid, v"
    assert pair.table("o", on=pair.target, columns=columns) == pair.table("o", columns=columns)


def test_owned_rows_without_a_key(make_pair: MakePair) -> None:
    profile = make_profile(rule("r", Policy.OWNED, owner="cid"))
    pair = make_pair(
        "CREATE TABLE r (cid int, t text); ALTER TABLE r REPLICA IDENTITY FULL; CREATE INDEX ON r (cid)",
        profile,
        origin=2,
    )
    pair.run("INSERT INTO r SELECT c, 'x' FROM generate_series(1, 3) c, generate_series(1, 5)")
    pair.apply()
    pair.run(
        "DELETE FROM r WHERE ctid IN (SELECT ctid FROM r WHERE cid = 2 LIMIT 2); UPDATE r SET cid = 2 WHERE cid = 3"
    )
    pair.apply()
    assert pair.run("SELECT cid, count(*)::int FROM r GROUP BY 1", on=pair.target) == [(2, 8)]


# -- merge

RULES = {
    "high": MergeRule("greatest"), "low": MergeRule("least"), "status": MergeRule("advance", order=("N", "P", "D")),
    "seen": MergeRule("latest", by="seenmtime", tie="S"), "seenmtime": MergeRule("latest", by="seenmtime"),
    "num": MergeRule("greatest"), "txt": MergeRule("least"),
}  # fmt: skip
COLUMNS: dict[str, tuple[str, list[str | None]]] = {
    "high": ("int", [None, "1", "2", "10"]), "low": ("int", [None, "1", "2", "10"]),
    "status": ('"char"', ["N", "P", "D", "?", "!"]), "seen": ('"char"', [None, "N", "S", "T"]),
    "seenmtime": ("int", [None, "1", "2"]), "num": ("numeric", [None, "1.0", "1.00", "2"]),
    "txt": ("varchar(9)", [None, "a", "B", "b", ""]),
}  # fmt: skip


def literal(value: str | None) -> str:
    return "NULL" if value is None else f"'{value}'"


@pytest.mark.parametrize("keyed", [True, False])
def test_merged_rows_follow_the_model(make_pair: MakePair, keyed: bool) -> None:
    """The same rows met in any order come to what the pure model says, column by column."""
    random_rows = random.Random(7)
    profile = make_profile(rule("t", Policy.MERGE, key=("k",), rules=RULES))
    key = "PRIMARY KEY" if keyed else "NOT NULL"
    columns = ", ".join(f"{name} {kind}" for name, (kind, _) in COLUMNS.items())
    pair = make_pair(f"CREATE TABLE t (k int {key}, {columns}); ALTER TABLE t REPLICA IDENTITY FULL", profile, origin=2)
    sets = [
        [{name: random_rows.choice(values) for name, (_, values) in COLUMNS.items()} for _ in range(3)]
        for _ in range(40)
    ]
    expected: dict[int, dict[str, Any]] = {}
    number = 0

    def typed(row: dict[str, Any]) -> dict[str, Any]:
        numbers = ("high", "low", "seenmtime", "num")
        return {n: v if v is None or n not in numbers else Number(v) for n, v in row.items()}

    for rows in sets:
        for order in itertools.permutations(rows):
            number += 1
            for at, row in enumerate(order):
                values = ", ".join(map(literal, row.values()))
                pair.run(f"INSERT INTO t VALUES ({number}, {values})")
                merged = typed(row)
                if at:
                    merged = merge_rows(RULES, expected[number], merged, lambda value: str(value).encode())
                    pair.run(f"DELETE FROM t WHERE k = {number}") if at < 2 else None
                else:
                    pair.run(f"DELETE FROM t WHERE k = {number}")
                expected[number] = merged
    profile_inserts = pair.frames()
    # Deletes are left out: every insert meets what is there.
    pair.profile = make_profile(rule("t", Policy.MERGE, key=("k",), rules=RULES, deletes=False))
    pair.apply(profile_inserts)
    names = ", ".join(f"{name}::text" for name in COLUMNS)
    found = pair.run(f"SELECT k, {names} FROM t ORDER BY k", on=pair.target)
    assert len(found) == number
    for key_found, *texts in found:
        want = expected[key_found]  # type: ignore[index]
        got = [value.decode() if isinstance(value, bytes) else value for value in texts]
        assert got == [None if value is None else str(value) for value in want.values()]


class Number(float):
    """A number that keeps its text."""

    def __new__(cls, written: str) -> Number:
        made = super().__new__(cls, written)
        made.written = written
        return made

    written: str

    def __str__(self) -> str:
        return self.written


PMG_RECEIVERS = (
    "CREATE TABLE cmsreceivers (cmailstore_cid int NOT NULL, cmailstore_rid int NOT NULL, pmail varchar(255) NOT NULL,"
    'receiver varchar(255), ticketid int NOT NULL, status "char" NOT NULL, seen "char" DEFAULT \'N\' NOT NULL,'
    "seenmtime int DEFAULT 0 NOT NULL, mtime int NOT NULL);"
    "CREATE INDEX ON cmsreceivers (cmailstore_cid, cmailstore_rid); ALTER TABLE cmsreceivers REPLICA IDENTITY FULL"
)


def test_receivers(make_pair: MakePair) -> None:
    """Rows come from their owner, states from anyone; what two nodes did to one row both survives."""
    pair = make_pair(PMG_RECEIVERS, load_profile("pmg"), origin=2)
    pair.run("INSERT INTO cmsreceivers SELECT 2, g, 'a@b', 'c@d', g, 'N', 'N', 0, 10 FROM generate_series(1, 20) g")
    pair.run("INSERT INTO cmsreceivers VALUES (3, 1, 'x', 'y', 1, 'N', 'N', 0, 10)")
    pair.apply()
    assert pair.run("SELECT DISTINCT cmailstore_cid FROM cmsreceivers", on=pair.target) == [(2,)]
    pair.run("UPDATE cmsreceivers SET seen = 'S', seenmtime = 20 WHERE ticketid = 4", on=pair.target)
    pair.run("UPDATE cmsreceivers SET status = 'D', mtime = 30 WHERE ticketid = 4")
    pair.run("UPDATE cmsreceivers SET seen = 'S', seenmtime = 11 WHERE ticketid = 5")
    pair.run("UPDATE cmsreceivers SET seen = 'N', seenmtime = 12 WHERE ticketid = 5")
    pair.run("UPDATE cmsreceivers SET status = 'D', mtime = 31 WHERE cmailstore_cid = 3")
    pair.run("DELETE FROM cmsreceivers WHERE ticketid IN (7, 8)")
    applier = pair.apply()
    assert applier.stats.repeats == 0
    state = "SELECT status, seen, seenmtime, mtime FROM cmsreceivers WHERE ticketid = {} AND cmailstore_cid = {}"
    assert pair.run(state.format(4, 2), on=pair.target) == [(b"D", b"S", 20, 30)]
    assert pair.run(state.format(5, 2), on=pair.target) == [(b"N", b"N", 12, 10)]
    # Chains are not ordered among each other: what node 2 did to node 3's row may come before the row itself.
    assert pair.run(state.format(1, 3), on=pair.target) == [(b"D", b"N", 0, 31)]
    assert pair.run("SELECT count(*)::int FROM cmsreceivers", on=pair.target) == [(19,)]


def test_greylist(make_pair: MakePair) -> None:
    schema = (
        "CREATE TABLE cgreylist (ipnet varchar(49) NOT NULL, sender varchar(255) NOT NULL,"
        "receiver varchar(255) NOT NULL,"
        "instance varchar(255), "
        "rctime int NOT NULL, extime int NOT NULL, delay int DEFAULT 0 NOT NULL, blocked int NOT NULL,"
        "passed int NOT NULL, cid int NOT NULL, mtime int NOT NULL, PRIMARY KEY (sender, ipnet, receiver))"
    )
    pair = make_pair(schema, load_profile("pmg"), origin=2)
    pair.run("INSERT INTO cgreylist VALUES ('10', 's', 'r', NULL, 100, 200, 0, 1, 0, 3, 100)", on=pair.target)
    pair.run(
        "INSERT INTO cgreylist VALUES ('10', 's', 'r', 'i', 90, 150, 5, 2, 0, 2, 120), ('11', 's', "
        "'r', NULL, 1, 1, 1, 1, 1, 2, 1)"
    )
    pair.run(
        "UPDATE cgreylist SET passed = 1, mtime = 130 WHERE ipnet = '10'; DELETE FROM cgreylist WHERE ipnet = '11'"
    )
    pair.apply()
    assert pair.table("cgreylist", on=pair.target) == [
        (b"(10,s,r,i,90,200,5,2,1,3,130)",),
        (b"(11,s,r,,1,1,1,1,1,2,1)",),
    ]
