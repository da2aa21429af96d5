"""The bulk executor against the row executor: the same rows, the same counters, the same errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.frames import Frame
from pmgsync.core.positions import LAST, Position, parse_lsn
from pmgsync.core.profile import MergeRule, Policy
from pmgsync.errors import PmgsyncError
from pmgsync.postgres.apply import applier, bulk
from pmgsync.postgres.apply.plan import PlannedTransaction
from pmgsync.postgres.apply.together import planned_together
from tests.harness.server import INCARNATION, Pair, make_profile, rule
from tests.harness.session import examples

pytestmark = pytest.mark.cluster

RULES = {"v": MergeRule("latest", by="w"), "w": MergeRule("greatest")}
PROFILE = make_profile(
    rule("m", Policy.MERGE, key=("k",), deletes=True, rules=RULES),
    rule("p", Policy.MERGE, key=("k",), deletes=False, rules=RULES),
    rule("e", Policy.MERGE, deletes=True, rules={"w": MergeRule("least"), "v": MergeRule("advance", order=("3", "1"))}),
    rule("d", Policy.MERGE, deletes=True, rules={}),
    rule("o", Policy.OWNED, owner="cid"),
    rule("y", Policy.OWNED, owner="cid"),
    rule("seen", Policy.LOCAL),
)  # fmt: skip
TABLES = {
    # A key alone; one more unique column; a key of two columns and a generated one; a value stored out of line.
    "k": "k int PRIMARY KEY, v int, w text",
    "u": "k int PRIMARY KEY, v int UNIQUE, w text",
    "c": "k int, v int, w numeric, g int GENERATED ALWAYS AS (v * 2) STORED, PRIMARY KEY (v, k)",
    "b": "k int PRIMARY KEY, v int, w text",
    # No key; found by all values though there is one; another identity.
    "n": "k int, v int, w text",
    "f": "k int PRIMARY KEY, v int, w text",
    "i": "v int, k int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, w text",
    "x": "k text PRIMARY KEY, v int, w int[]",
    # Merged: by a unique index; by one that is not, so that a key may be there twice; with columns that bear the names
    # of what a merge's statement has; without rules.
    "m": "k int PRIMARY KEY, v int, w int",
    "p": "k int NOT NULL, v int, w int",
    "e": "k int PRIMARY KEY, v int, w text, lost int DEFAULT 1, came int DEFAULT 2, hit text",
    "d": "k int PRIMARY KEY, v int, w text",
    # Owned, found by all values and by the key; of the latter half are not the origin's.
    "o": "cid int, k int, v int, w text, PRIMARY KEY (cid, k)",
    "y": "k int, cid int, v int, w text, PRIMARY KEY (k, cid)",
    # What fires, and sees the order.
    "t": "k int PRIMARY KEY, v int, w text",
}
SCHEMA = (
    ";".join(f"CREATE TABLE {name} ({columns})" for name, columns in TABLES.items())
    + "; CREATE INDEX ON p (k); ALTER TABLE p REPLICA IDENTITY FULL;"
    "ALTER TABLE n REPLICA IDENTITY FULL; ALTER TABLE f REPLICA IDENTITY FULL; ALTER TABLE o REPLICA IDENTITY FULL;"
    "ALTER TABLE b ALTER w SET STORAGE EXTERNAL; CREATE TABLE seen (n serial, what text);"
    "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "INSERT INTO public.seen (what) SELECT format('%s %s %s', TG_OP, OLD, NEW); "
    "INSERT INTO public.seen (what) SELECT format('k has %s', (SELECT sum(v) FROM public.k)); RETURN NULL; END $$;"
    "CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION see();"
    "ALTER TABLE t ENABLE ALWAYS TRIGGER see"
)
SCHEMA_THERE = SCHEMA.replace("ALTER TABLE t ENABLE ALWAYS TRIGGER see", "ALTER TABLE t DISABLE TRIGGER see")
LONG = "repeat('long ', 800)"

numbers = st.integers(0, 8)


def change(table: str, verb: str, key: int, other: int, value: int) -> str:
    """Return a statement; it may well be refused."""
    owner = {"o": "1, ", "y": f"{1 + key % 2}, "}.get(table, "")
    columns = "cid, k, v, w" if owner else "k, v, w"
    long = {"b": LONG, "c": f"{value}.50", "x": f"'{{{value},NULL}}'", "m": str(other), "p": str(other)}.get(
        table, f"'w\\{value}''\"'"
    )
    match verb:
        case "insert":
            system = " OVERRIDING SYSTEM VALUE" if table == "i" else ""
            return f"INSERT INTO {table} ({columns}){system} VALUES ({owner}{key}, {value}, {long})"
        case "many":
            system = " OVERRIDING SYSTEM VALUE" if table == "i" else ""
            return (
                f"INSERT INTO {table} ({columns}){system} SELECT {owner}{key * 20} + g, {key * 20} + g, {long} "
                f"FROM generate_series(1, 12) AS g ON CONFLICT DO NOTHING"
            )
        case "value":
            return f"UPDATE {table} SET v = {value} WHERE k::text = '{key}'"
        case "text":
            return f"UPDATE {table} SET w = {long} WHERE k::text = '{key}'"
        case "all":
            return f"UPDATE {table} SET v = v + {1 + value}"
        case "key":
            return f"UPDATE {table} SET k = {other} WHERE k::text = '{key}'"
        case "swap":
            return (
                f"UPDATE {table} SET k = 999 WHERE k::text = '{key}'; UPDATE {table} SET k = {key} "
                f"WHERE k::text = '{other}'; UPDATE {table} SET k = {other} WHERE k::text = '999'"
            )
        case "shift":
            return (
                f"UPDATE {table} SET v = v + 1 WHERE ctid = ANY (SELECT ctid FROM {table} ORDER BY v DESC); "
                f"UPDATE {table} SET v = 0 WHERE k::text = '{key}'"
            )
        case "again":
            return (
                f"DELETE FROM {table} WHERE k::text = '{key}'; "
                f"INSERT INTO {table} ({columns}) VALUES ({owner}{key}, {value}, {long})"
            )
        case "delete":
            return f"DELETE FROM {table} WHERE k::text = '{key}'"
        case "most":
            return f"DELETE FROM {table} WHERE v % 3 <> {value % 3}"
        case _:
            return f"TRUNCATE {table}" + (", k" if value % 2 and table != "k" else "")


VERBS = (
    "insert", "insert", "many", "value", "value", "text", "all", "key", "swap", "shift", "again", "again", "delete",
    "delete", "most", "truncate",
)  # fmt: skip
START = [change(table, "insert", key, 0, key) for table in sorted(TABLES) for key in range(1, 7)]
statements = st.builds(change, st.sampled_from(sorted(TABLES)), st.sampled_from(VERBS), numbers, numbers, numbers)
transactions = st.lists(st.lists(statements, min_size=1, max_size=10), min_size=2, max_size=6)
sizes = st.sampled_from([1 << 16, 1500, 500])
"""Of frames: where there are several, the transactions of later ones are planned together."""
# What somebody does on the receiving side, so that changes do not meet what they expect.
harm = st.lists(
    st.builds(
        change,
        st.sampled_from(sorted(set(TABLES) - {"t"})),
        st.sampled_from(["insert", "delete", "value", "key"]),
        numbers, numbers, numbers,
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(pg_bindir: str) -> Iterator[tuple[Pair, Pair]]:
    """The origin with the database that bulk writes to, and a second one for single rows."""
    with EmbeddedPostgres() as running:
        made = (Pair(running, PROFILE), Pair(running, PROFILE))
        for pair in made:
            pair.setup(SCHEMA_THERE, target=SCHEMA)
        yield made
        for pair in made:
            pair.close()


def block(statements_given: list[str]) -> str:
    """Return one transaction in which a statement that is refused does nothing."""
    parts = [f"BEGIN {statement}; EXCEPTION WHEN OTHERS THEN NULL; END;" for statement in statements_given]
    return "DO $do$ BEGIN " + " ".join(parts) + " END $do$"


def begin_anew(pairs: tuple[Pair, Pair], frame_bytes: int) -> None:
    """Empty tables everywhere, and a chain that begins here."""
    there, other = pairs
    empty = f"TRUNCATE {', '.join(TABLES)}, seen RESTART IDENTITY"
    there.run(f"{empty}; {block(START)}")
    for pair in pairs:
        pair.run("SET session_replication_role = replica", on=pair.target)
        pair.run(f"{empty}; TRUNCATE pmgsync.conflict, pmgsync.repair, pmgsync.stale_table", on=pair.target)
        pair.run(f"{block(START)}; TRUNCATE seen RESTART IDENTITY", on=pair.target)
    there.messages()
    ((lsn,),) = there.run("SELECT pg_current_wal_insert_lsn()::text")
    assert isinstance(lsn, bytes)
    position = Position(parse_lsn(lsn.decode()), LAST)
    there.again(position, frame_bytes=frame_bytes)
    for pair in (there, other):
        with pair.applier() as applier:
            applier.begin_chain(INCARNATION, position)


def outcome(pair: Pair, frames: list[Frame]) -> dict[str, object]:
    """Apply frames, and return everything that can be seen of it."""
    failure = ""
    with pair.applier() as applier:
        try:
            applier.apply(frames)
        except PmgsyncError as error:
            failure = f"{type(error).__name__}: {error}"
        stats = applier.stats
        found: dict[str, object] = {
            "failure": failure, "position": applier.position, "lost": stats.lost, "rows": stats.rows,
            "conflicts": stats.conflicts, "skipped": stats.skipped, "stale": stats.stale,
        }  # fmt: skip
    for name in (*TABLES, "seen", "pmgsync.conflict", "pmgsync.repair", "pmgsync.stale_table"):
        columns = {"pmgsync.conflict": "name, row_key, column_name, rule, lost", "pmgsync.repair": "name, row_key",
                   "pmgsync.stale_table": "name, kind, reason"}.get(name, "")  # fmt: skip
        found[name] = pair.table(name, on=pair.target, columns=columns)
    return found


def compare(pairs: tuple[Pair, Pair], done: list[list[str]], harmful: list[str], frame_bytes: int) -> dict[str, object]:
    """Do some harm, apply transactions in both ways, and compare."""
    begin_anew(pairs, frame_bytes)
    for transaction in done:
        pairs[0].run(block(transaction))
    frames = pairs[0].frames()
    found = []
    for pair, least in zip(pairs, (1, 1_000_000), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bulk, "LEAST_ITEMS", least)
            patch.setattr(bulk, "LEAST_ROWS", 1)
            if harmful:
                pair.run(block(harmful), on=pair.target)
            found.append(outcome(pair, frames))
    assert found[0] == found[1]
    return found[0]


@settings(max_examples=examples(20), suppress_health_check=list(HealthCheck))
@given(done=transactions, frame_bytes=sizes)
def test_the_same_rows(pairs: tuple[Pair, Pair], done: list[list[str]], frame_bytes: int) -> None:
    found = compare(pairs, done, [], frame_bytes)
    assert found["failure"] == ""
    for name in set(TABLES) - set("mpedy"):  # a merge takes no value back, and of the last half stays
        assert found[name] == pairs[0].table(name), name


@settings(max_examples=examples(20), suppress_health_check=list(HealthCheck))
@given(done=transactions, harmful=harm, frame_bytes=sizes)
def test_the_same_errors(pairs: tuple[Pair, Pair], done: list[list[str]], harmful: list[str], frame_bytes: int) -> None:
    compare(pairs, done, harmful, frame_bytes)


@pytest.mark.parametrize(
    ("harmful", "failure"),
    [
        ("", ""),
        ("UPDATE k SET k = 50 WHERE k = 4", "the row to update in public.k is here 0 times"),
        ("INSERT INTO u VALUES (137, 9, 'x')", 'violates unique constraint "u_pkey"'),
    ],
)
def test_transactions_planned_together_fail_by_themselves(pairs: tuple[Pair, Pair], harmful: str, failure: str) -> None:
    """Later frames find their tables known. Whatever goes wrong in them is told of the transaction that it is in, and
    those before it are committed."""
    done = [
        [f"INSERT INTO u VALUES ({n}, {n}, 'w')", f"UPDATE k SET v = {n} WHERE k = {n % 6 + 1}",
         f"DELETE FROM u WHERE k = {n - 1}", f"INSERT INTO c (k, v, w) VALUES ({n}, {n}, 1)"]
        for n in range(100, 160)
    ]  # fmt: skip
    counts: list[int] = []

    def counted(*given: Any) -> PlannedTransaction | None:
        planned = planned_together(*given)
        counts.append(planned.count if planned is not None else 0)
        return planned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(applier, "planned_together", counted)
        found = compare(pairs, done, [harmful] if harmful else [], 1500)
    assert max(counts) > 3
    assert failure in str(found["failure"]) and bool(failure) == bool(found["failure"])
    assert found["rows"] == 239 if not failure else 0 < int(str(found["rows"])) < 239
