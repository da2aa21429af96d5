"""Which transactions of a chain change master-owned tables here, over forks and returns, on a real server."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.ceilings import Ceilings
from pmgsync.core.document import Epoch, Fork
from pmgsync.core.frames import Frame
from pmgsync.core.positions import LAST, Position, format_lsn
from pmgsync.core.profile import MergeRule, Policy
from pmgsync.errors import AwaitedError, UnknownEpochError
from pmgsync.postgres.setup.returning import fetch_from_master
from pmgsync.postgres.setup.sequence_values import publish_sequences
from tests.harness.server import INCARNATION, Pair, make_profile, rule
from tests.harness.session import examples

pytestmark = pytest.mark.cluster

PROFILE = make_profile(
    rule("o", Policy.OWNED, owner="cid"),
    rule("g", Policy.MERGE, rules={"v": MergeRule("greatest")}),
    ddl=True,
)
SCHEMA = (
    "CREATE TABLE m (id serial PRIMARY KEY, v int); CREATE TABLE emptied (id int PRIMARY KEY); "
    "CREATE TABLE o (cid int, rid int, v text, PRIMARY KEY (cid, rid)); CREATE TABLE g (k int PRIMARY KEY, v int)"
)


@pytest.fixture
def pair(server: EmbeddedPostgres) -> Iterator[Pair]:
    made = Pair(server, PROFILE)
    made.setup(SCHEMA)
    yield made
    made.close()


@pytest.fixture
def watched(server: EmbeddedPostgres) -> Iterator[Pair]:
    made = Pair(server, PROFILE)
    made.setup(SCHEMA, watched=True)
    yield made
    made.close()


def mirrored(pair: Pair) -> list[tuple[object, ...]]:
    return pair.run("SELECT id FROM m ORDER BY id", on=pair.target)


def ids(pair: Pair, table: str) -> list[int]:
    return [int(str(number)) for (number,) in pair.run(f"SELECT {table} ORDER BY 1", on=pair.target)]


def write(pair: Pair, number: int, rows: int = 1) -> None:
    """Write to tables of every policy, in one transaction."""
    pair.run(
        f"BEGIN; INSERT INTO m (id, v) SELECT {number} * 1000 + i, i FROM generate_series(1, {rows}) AS i; "
        f"INSERT INTO o SELECT 1, {number} * 1000 + i, 'owned' FROM generate_series(1, {rows}) AS i; "
        f"INSERT INTO g VALUES ({number}, {number}); COMMIT"
    )


def end(frames: list[Frame]) -> int:
    return frames[-1].here.lsn


def stand(pair: Pair, origin: int, lsn: int, incarnation: int = INCARNATION) -> None:
    """Say that the target has applied another chain up to an LSN."""
    pair.run(
        f"INSERT INTO pmgsync.position (origin, incarnation, lsn, part) VALUES ({origin}, {incarnation}, "
        f"'{format_lsn(lsn)}', {LAST}) ON CONFLICT (origin) DO UPDATE SET lsn = EXCLUDED.lsn, "
        "incarnation = EXCLUDED.incarnation",
        on=pair.target,
    )


def fork(lsn: int) -> Fork:
    return Fork(INCARNATION, lsn)


def test_past_the_fork_only_owned_and_merged_rows_come(pair: Pair) -> None:
    write(pair, 1)
    before = pair.frames()
    write(pair, 2)
    pair.run("TRUNCATE m; UPDATE o SET v = 'changed' WHERE rid = 1001; INSERT INTO m (id) VALUES (5)")
    past = pair.frames()
    pair.history = (Epoch(1, 1), Epoch(2, 2, fork(end(before))))
    applier = pair.apply([*before, *past])
    assert ids(pair, "id FROM m") == [1001] and ids(pair, "rid FROM o") == [1001, 2001]
    assert pair.run("SELECT v FROM o WHERE rid = 1001", on=pair.target) == [(b"changed",)]
    assert ids(pair, "k FROM g") == [1, 2] and applier.stats.skipped == 3
    assert applier.position == past[-1].here, "nothing waits"


def test_members_that_take_the_document_early_or_late_are_alike_up_to_the_fork(pair: Pair) -> None:
    """One that has applied past the fork is ahead; what comes afterwards does not count for it either."""
    write(pair, 1)
    before = pair.frames()
    write(pair, 2)
    ahead = pair.frames()
    pair.apply([*before, *ahead])
    pair.history = (Epoch(1, 1), Epoch(2, 2, fork(end(before))))
    pair.epoch = 2
    pair.again(ahead[-1].here)
    write(pair, 3)
    pair.apply()
    assert ids(pair, "id FROM m") == [1001, 2001] and ids(pair, "rid FROM o") == [1001, 2001, 3001]


def test_a_transaction_of_an_epoch_that_is_not_known_waits(pair: Pair) -> None:
    write(pair, 1)
    known = pair.frames()
    pair.epoch, pair.master = 2, 3
    pair.again(known[-1].here)
    write(pair, 2)
    pair.epoch = 1
    unknown = pair.frames()
    with pair.applier() as applier:
        for _ in range(2):
            with pytest.raises(UnknownEpochError, match="epoch 2") as caught:
                applier.apply([*known, *unknown])
            assert caught.value.recoverable and applier.position == known[-1].here
        assert ids(pair, "rid FROM o") == [1001] and ids(pair, "id FROM m") == []
        pair.elsewhere = 2
        applier.apply(unknown)
    assert ids(pair, "rid FROM o") == [1001, 2001] and ids(pair, "id FROM m") == [], "in a split nothing waits"
    pair.elsewhere, pair.epoch = 0, 2
    pair.history = (Epoch(1, 3), Epoch(2, 1, start=fork(end(unknown))))
    pair.again(unknown[-1].here)
    write(pair, 3)
    pair.apply()
    assert ids(pair, "id FROM m") == [3001]


def test_a_new_master_waits_for_what_it_had_of_the_one_before(pair: Pair) -> None:
    """Or a row of both would end with the older value: the two chains are applied side by side."""
    write(pair, 1)
    own = pair.frames()
    pair.epoch = 2
    pair.again(own[-1].here)
    write(pair, 2)
    as_master = pair.frames()
    pair.history = (Epoch(1, 2), Epoch(2, 1, fork(50), start=fork(end(own))))
    pair.held = "something is exported"
    with pair.applier() as applier:
        with pytest.raises(AwaitedError, match="chain of node 2"):
            applier.apply([*own, *as_master])
        assert ids(pair, "rid FROM o") == [1001] and applier.position == own[-1].here, "what it owns does not wait"
        stand(pair, 2, 49)
        with pytest.raises(AwaitedError, match="chain of node 2"):
            applier.apply(as_master)
        stand(pair, 2, 50)
        with pytest.raises(AwaitedError, match="something is exported"):
            applier.apply(as_master)
        pair.run(
            "INSERT INTO pmgsync.stale_table (origin, schema, name, kind, reason, lsn) "
            "VALUES (1, 'public', 'm', 'table', 'it was touched', '0/0')",
            on=pair.target,
        )
        pair.held = ""
        applier.apply(as_master)
        assert ids(pair, "id FROM m") == [] and ids(pair, "rid FROM o") == [1001, 2001], "it is to be fetched"
    pair.run("DELETE FROM pmgsync.stale_table", on=pair.target)
    stand(pair, 2, 3, incarnation=5)
    write(pair, 3)
    pair.apply()
    assert ids(pair, "id FROM m") == [3001], "a chain that was begun anew was copied after the fork"


def test_what_a_master_in_between_wrote_does_not_meet_rows_that_are_to_be_fetched(pair: Pair) -> None:
    """A master that was away for two epochs has rows of its own, that do not count, where the next one wrote others."""
    write(pair, 1)
    pair.apply()
    pair.run("INSERT INTO m VALUES (2001, 0)", on=pair.target)
    write(pair, 2)
    before = pair.frames()
    write(pair, 3)
    dsn, tables = pair.server.dsn(pair.names[1]), [(b"public", b"m")]
    fetch_from_master(dsn, 2, tables, forks={1: fork(end(before))})
    pair.apply([*before, *pair.frames()])
    assert ids(pair, "id FROM m") == [1001, 2001, 3001] and ids(pair, "v FROM m WHERE id = 2001") == [0]
    assert ids(pair, "rid FROM o") == [1001, 2001, 3001], "other tables go on"


@pytest.mark.parametrize("counts", [True, False])
def test_a_large_transaction_in_parts(pair: Pair, counts: bool) -> None:
    write(pair, 1)
    before = pair.frames()
    pair.framer = pair._framer(before[-1].here, 2_000)
    write(pair, 2, rows=300)
    parts = pair.frames()
    assert len(parts) > 5
    pair.history = (Epoch(1, 1), Epoch(2, 2, fork(end(parts) if counts else end(parts) - 1)))
    pair.apply([*before, *parts[:4]])
    with pair.applier() as applier:
        for part in [*before, *parts]:
            applier.apply([part])
        assert applier.position == parts[-1].here
    assert len(ids(pair, "id FROM m")) == (301 if counts else 1)
    assert len(ids(pair, "rid FROM o")) == 301 and ids(pair, "k FROM g") == [1, 2]


def test_a_large_transaction_of_an_unknown_epoch_waits(pair: Pair) -> None:
    pair.epoch = 2
    pair.framer = pair._framer(Position(0, LAST), 2_000)
    write(pair, 1, rows=300)
    parts = pair.frames()
    with pair.applier() as applier:
        with pytest.raises(UnknownEpochError):
            applier.apply(parts)
        assert applier.position == Position(0, LAST) and ids(pair, "rid FROM o") == []
        pair.history = (Epoch(1, 2), Epoch(2, 1))
        applier.apply(parts)
    pair.assert_equal()


def test_what_only_the_master_may_say_is_not_done_past_the_fork(watched: Pair) -> None:
    """A change of the schema, sequences, and a table whose content is to be fetched."""
    pair = watched
    application = psycopg2.connect(pair.server.dsn(pair.names[0]))
    application.autocommit = True
    write(pair, 1)
    application.cursor().execute("ALTER TABLE g ADD w int")
    before = pair.frames()
    application.cursor().execute("ALTER TABLE m ADD w int; CREATE TABLE made (id int PRIMARY KEY); DROP TABLE emptied")
    pair.run("SELECT setval('m_id_seq', 5000)")
    publish_sequences(pair.source, pair.profile, Ceilings())
    application.cursor().execute("CREATE TABLE filled AS SELECT 1 AS id")
    application.close()
    write(pair, 2)
    past = pair.frames()
    pair.history = (Epoch(1, 1), Epoch(2, 2, fork(end(before))))
    pair.apply([*before, *past])
    assert pair.run(
        "SELECT relname::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1",
        on=pair.target,
    ) == [(b"emptied",), (b"g",), (b"m",), (b"o",)]
    assert pair.run("SELECT last_value::int < 5000 FROM m_id_seq", on=pair.target) == [(True,)]
    assert pair.run("SELECT count(*)::int FROM pmgsync.stale_table", on=pair.target) == [(0,)]
    assert ids(pair, "id FROM m") == [1001] and ids(pair, "rid FROM o") == [1001, 2001]
    assert pair.run("SELECT attnum FROM pg_attribute WHERE attrelid = 'g'::regclass AND attname = 'w'", on=pair.target)


@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_against_an_oracle(server: EmbeddedPostgres, data: st.DataObject) -> None:
    """However transactions are framed, marked, grouped and repeated, the same ones count, and no others."""
    pair = Pair(server, PROFILE)
    try:
        pair.setup(SCHEMA)
        stand(pair, 2, 9)
        count = data.draw(st.integers(3, 8), label="transactions")
        sizes = data.draw(st.lists(st.sampled_from([1, 1, 1, 60]), min_size=count, max_size=count), label="rows")
        leaves = data.draw(st.integers(0, count), label="fork after")
        returns = data.draw(st.integers(leaves, count), label="master again after")
        ends: list[int] = []
        messages: list[list[bytes]] = []
        for number, rows in enumerate(sizes):
            write(pair, number + 1, rows)
            messages.append(pair.messages())
            ends.append(end(pair.frames(messages[-1])))
        places = [0, *ends]
        back = Epoch(3, 1, fork(9), start=fork(places[returns]))
        pair.history = (Epoch(1, 1), Epoch(2, 2, fork(places[leaves])), back)
        expected = sorted(
            (number + 1) * 1000 + row + 1
            for number, rows in enumerate(sizes) if number < leaves or number >= returns
            for row in range(rows)
        )  # fmt: skip
        position = Position(0, LAST)
        flat = [message for each in messages for message in each]
        while position.lsn < ends[-1]:
            # Another run of capture, which may know another epoch and cut elsewhere.
            pair.epoch = data.draw(st.integers(1, 3), label="mark")
            pair.again(position, frame_bytes=data.draw(st.sampled_from([800, 1 << 16]), label="frame bytes"))
            frames = pair.frames(flat)
            taken = data.draw(st.integers(1, len(frames)), label="frames")
            with pair.applier() as applier:
                position = max(position, applier.apply(frames[:taken]))
        assert ids(pair, "id FROM m") == expected
        assert ids(pair, "k FROM g") == list(range(1, count + 1))
        assert len(ids(pair, "rid FROM o")) == sum(sizes)
    finally:
        pair.close()
