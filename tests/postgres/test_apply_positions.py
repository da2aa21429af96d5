"""Applying and positions: frames that overlap, transactions in parts, errors."""

from __future__ import annotations

import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.positions import LAST, Position
from pmgsync.errors import ApplyError, ProtocolError, ResyncRequiredError, TransientApplyError
from tests.harness.apply_pairs import MakePair
from tests.harness.server import INCARNATION

pytestmark = pytest.mark.cluster


# -- positions and frames


def test_overlap_and_repeats(make_pair: MakePair) -> None:
    pair = make_pair(
        "CREATE TABLE t (id serial PRIMARY KEY, n int); CREATE TABLE d (n int); ALTER TABLE d REPLICA IDENTITY FULL"
    )
    messages: list[bytes] = []
    for number in range(30):
        pair.run(
            f"BEGIN; INSERT INTO t (n) VALUES ({number}); INSERT INTO d VALUES (1); UPDATE t SET n = n + 1; COMMIT"
        )
        messages += pair.messages()
    pair.framer = pair._framer(Position(0, LAST), 700)
    small = pair.frames(messages)
    pair.again(Position(0, LAST))
    large = pair.frames(messages)
    assert len(small) > 10 > len(large)
    pair.apply(small[:3])
    pair.apply(large)
    pair.assert_equal()
    for frame in small:
        pair.apply([frame, frame])
    assert pair.apply(small + large).stats.transactions == 0
    pair.assert_equal()


def test_a_gap_is_refused(make_pair: MakePair) -> None:
    pair = make_pair("CREATE TABLE t (id int PRIMARY KEY)")
    frames = []
    for number in range(3):
        pair.run(f"INSERT INTO t VALUES ({number})")
        frames += pair.frames()
    with pair.applier() as applier:
        with pytest.raises(ProtocolError):
            applier.apply([frames[0], frames[2]])
        applier.apply(frames)
    pair.assert_equal()


def test_another_incarnation_is_refused(make_pair: MakePair) -> None:
    pair = make_pair("CREATE TABLE t (id int PRIMARY KEY)")
    pair.run("INSERT INTO t VALUES (1)")
    frames = pair.frames()
    with pair.applier() as applier:
        applier.begin_chain(INCARNATION + 1, Position(0, LAST))
        with pytest.raises(ResyncRequiredError):
            applier.apply(frames)


def test_parts(make_pair: MakePair) -> None:
    """Nothing of a large transaction is seen before its last part; a new attempt begins it again."""
    pair = make_pair("CREATE TABLE t (id int PRIMARY KEY, v text)")
    pair.run("INSERT INTO t VALUES (0, 'before')")
    pair.run(
        "BEGIN; INSERT INTO t SELECT g, repeat('x', 50) FROM generate_series(1, 400) g; "
        "UPDATE t SET v = v || 'y'; DELETE FROM t WHERE id % 3 = 0; COMMIT"
    )
    pair.run("INSERT INTO t VALUES (9999, 'after')")
    messages = pair.messages()
    pair.framer = pair._framer(Position(0, LAST), 4000)
    first = pair.frames(messages)
    pair.again(Position(0, LAST), frame_bytes=5000)
    second = pair.frames(messages)
    assert len(first) > 10
    with pair.applier() as applier:
        for frame in first[:5]:
            before = applier.position
            applier.apply([frame])
            assert applier.position.complete and applier.position >= before
        assert pair.run("SELECT count(*)::int FROM t", on=pair.target) == [(1,)]
        applier.apply(second[3:5])  # of another attempt, not its beginning
        assert pair.run("SELECT count(*)::int FROM t", on=pair.target) == [(1,)]
        applier.apply(second[:4])
        applier.apply(second[2:6])
    with pair.applier() as applier:  # a crash in between: the parts are gone with the session
        assert pair.run("SELECT count(*)::int FROM t", on=pair.target) == [(1,)]
        applier.apply(second[6:8])
        applier.apply(second)
        assert applier.position == second[-1].here
    pair.assert_equal()


def test_position_moves_with_the_rows(make_pair: MakePair) -> None:
    """After any end of the session the position says exactly what is in."""
    pair = make_pair("CREATE TABLE t (id int PRIMARY KEY)")
    with pair.applier() as applier:
        for number in range(20):
            pair.run(f"INSERT INTO t VALUES ({number})")
            applier.apply(pair.frames())
            if number % 5 == 0:
                assert pair.end_appliers() == 1
                pair.run(f"INSERT INTO t VALUES ({number + 100})")
                frames = pair.frames()
                for _ in range(50):
                    try:
                        applier.apply(frames)
                        break
                    except TransientApplyError:
                        continue
    pair.assert_equal()
    with pair.applier() as again:
        assert again.position == applier.position


# -- errors


def test_divergence_stops_the_chain(make_pair: MakePair) -> None:
    pair = make_pair("CREATE TABLE t (id int PRIMARY KEY, v text)")
    pair.both("INSERT INTO t SELECT g, 'v' FROM generate_series(1, 30) g")
    pair.run("DELETE FROM t WHERE id = 7", on=pair.target)
    pair.run("UPDATE t SET v = 'w' WHERE id < 4")
    pair.run("BEGIN; UPDATE t SET v = 'x' WHERE id = 5; UPDATE t SET v = 'x' WHERE id = 7; COMMIT")
    pair.run("UPDATE t SET v = 'y' WHERE id = 8")
    frames = pair.frames()
    with pair.applier() as applier:
        for _ in range(2):
            with pytest.raises(ApplyError) as caught:
                applier.apply(frames)
            assert caught.value.table == "public.t" and caught.value.lsn and caught.value.hint
            assert not caught.value.recoverable
            assert pair.run("SELECT array_agg(id ORDER BY id)::text FROM t WHERE v <> 'v'", on=pair.target) == [
                (b"{1,2,3}",)
            ]
        pair.run("INSERT INTO t VALUES (7, 'v')", on=pair.target)
        applier.apply(frames)
    pair.assert_equal()


def test_unique_violation_stops_the_chain(make_pair: MakePair) -> None:
    pair = make_pair("CREATE TABLE t (id int PRIMARY KEY, v text)")
    pair.run("INSERT INTO t VALUES (15, 'local')", on=pair.target)
    pair.run("INSERT INTO t VALUES (99, 'first')")
    pair.run("INSERT INTO t SELECT g, 'v' FROM generate_series(1, 30) g")
    with pair.applier() as applier:
        frames = pair.frames()
        with pytest.raises(ApplyError) as caught:
            applier.apply(frames)
        assert (caught.value.sqlstate, caught.value.table) == ("23505", "public.t")
        assert pair.table("t", on=pair.target) == [(b"(15,local)",), (b"(99,first)",)]
        pair.run("DELETE FROM t WHERE id = 15", on=pair.target)
        applier.apply(frames)
    pair.assert_equal()


def test_a_missing_table_is_left_out_and_noted(make_pair: MakePair) -> None:
    pair = make_pair(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)",
        target="CREATE TABLE t (id int PRIMARY KEY)",
    )
    pair.run("INSERT INTO t VALUES (1)")
    pair.run("INSERT INTO u VALUES (1)")
    pair.run("INSERT INTO t VALUES (2)")
    with pair.applier() as applier:
        applier.apply(pair.frames())
        assert applier.stats.stale == 1 and applier.maintain() == []
        assert pair.table("t", on=pair.target) == [(b"(1)",), (b"(2)",)]
        pair.run("CREATE TABLE u (id int PRIMARY KEY)", on=pair.target)
        assert applier.maintain() == [(b"public", b"u")] and applier.maintain() == []  # one fetch at a time


def test_what_passes_is_transient(make_pair: MakePair, server: EmbeddedPostgres) -> None:
    pair = make_pair("CREATE TABLE t (id int PRIMARY KEY)")
    pair.run("INSERT INTO t VALUES (1)")
    frames = pair.frames()
    with pair.applier() as applier:
        assert pair.end_appliers() == 1
        with pytest.raises(TransientApplyError):
            applier.apply(frames)
        for _ in range(50):
            try:
                applier.apply(frames)
            except TransientApplyError:
                continue
            break
        with pytest.raises(TransientApplyError), pair.applier():  # one applier a chain
            pass
    pair.assert_equal()
