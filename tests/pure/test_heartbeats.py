"""What a heartbeat tells of conflicts stays small, whoever sends it; what it tells of clocks is as near as can be."""

from __future__ import annotations

from typing import Any

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from broker.heartbeats.conflicts import MAX_NAME, MAX_NAMES, OTHER, add_up, read_counters
from broker.heartbeats.heartbeat import MAX_ALERTS, MAX_BYTES, Applied, Heartbeat, pack_applied, parse_applied
from broker.heartbeats.skew import SAMPLES, ClockSkew
from pmgsync.core.positions import MAX_LSN, Position

names = st.one_of(st.sampled_from(["public.a.x", "public.b.y", OTHER]), st.text(min_size=1, max_size=300))
counters = st.dictionaries(names, st.integers(1, 1000), max_size=150)


def heartbeat(**other: Any) -> Heartbeat:
    values: dict[str, Any] = {
        "cluster": b"c" * 16, "cid": 1, "epoch": 1, "serial": 1, "master": 1, "time_us": 1, "uptime_s": 1, "load1": 0.0,
        "mem_pct": 1.0, "disk_pct": 1.0, "state": "A", "error": "", "alerts": (), "chains": {}, "own": None,
        "applied": {},
    }  # fmt: skip
    return Heartbeat(**(values | other))


@given(st.lists(counters, max_size=4))
def test_counters_are_added_up_and_bounded(given_counters: list[dict[str, int]]) -> None:
    total = add_up(given_counters)
    assert sum(total.values()) == sum(sum(each.values()) for each in given_counters), "none is dropped"
    assert len(total) <= MAX_NAMES + 1
    assert all(len(name) <= MAX_NAME for name in total)
    sums: dict[str, int] = {}
    for each in given_counters:
        for name, count in each.items():
            sums[name[:MAX_NAME]] = sums.get(name[:MAX_NAME], 0) + count
    kept = {name: count for name, count in total.items() if name != OTHER}
    assert all(sums[name] == count for name, count in kept.items())
    gone = [count for name, count in sums.items() if name not in total]
    assert not gone or (len(kept) == MAX_NAMES and max(gone) <= min(kept.values())), "the greatest are kept"


@given(st.dictionaries(st.text(max_size=300), st.integers(1, MAX_LSN * 2 + 1), max_size=120))
def test_a_heartbeat_carries_whatever_workers_count(counted: dict[str, int]) -> None:
    sent = add_up([counted, counted])
    packed = heartbeat(conflicts=sent).pack()
    assert len(packed) < MAX_BYTES // 4
    assert Heartbeat.unpack(packed).conflicts == sent


@given(st.lists(st.tuples(st.sampled_from(["x", "\N{SNOWMAN}"]), st.integers(0, 2000)), max_size=300))
def test_a_heartbeat_carries_the_alerts_that_fit(texts: list[tuple[str, int]]) -> None:
    alerts = [{"kind": "table", "text": char * length} for char, length in texts]
    packed = heartbeat(alerts=tuple(alerts), error="\N{SNOWMAN}" * 2000).pack()
    assert len(packed) <= MAX_BYTES
    came = Heartbeat.unpack(packed).alerts
    assert list(came) == alerts[: len(came)]
    assert len(came) == min(len(alerts), MAX_ALERTS) or sum(len(alert["text"]) for alert in alerts) * 3 > 100 << 10


def test_alerts_of_many_workers_do_not_silence_a_member() -> None:
    alerts = tuple({"kind": "table", "text": f"{n} " * 400} for n in range(2000))
    assert 50 < len(Heartbeat.unpack(heartbeat(alerts=alerts).pack()).alerts) <= MAX_ALERTS


def test_a_member_that_does_not_count_is_read() -> None:
    raw = msgpack.unpackb(heartbeat().pack(), strict_map_key=False)
    del raw["conflicts"]
    assert Heartbeat.unpack(msgpack.packb(raw)).conflicts == {}


def test_what_is_no_counter_is_left_out() -> None:
    assert read_counters({"a": 1, "b": -1, "c": 0, "d": True, "e": 1.5, "f": "1", 7: 7, b"h": 8, "i": None}) == {"a": 1}
    for nonsense in (None, 5, "text", [1], [["a", 1]]):
        assert read_counters(nonsense) == {}


times_us = st.integers(0, 10_000_000)


@given(st.integers(-(10**12), 10**12), st.lists(st.tuples(times_us, times_us), min_size=1, max_size=60))
def test_a_clock_is_judged_by_the_fastest_heartbeat(ahead_us: int, steps: list[tuple[int, int]]) -> None:
    skew = ClockSkew()
    assert skew.seconds is None
    now_us = 1_700_000_000_000_000
    for wait_us, under_way_us in steps:
        now_us += wait_us
        skew.note(now_us + ahead_us, now_us + under_way_us)
    fastest_us = min(under_way_us for _, under_way_us in steps[-SAMPLES:])
    assert skew.seconds == (ahead_us - fastest_us) / 1e6


def test_a_clock_that_was_put_right_is_seen_to_be() -> None:
    skew = ClockSkew()
    for ahead_us in [5_000_000] * SAMPLES + [0] * SAMPLES:
        skew.note(ahead_us, 0)
    assert skew.seconds == 0


lsns = st.integers(0, MAX_LSN)
vectors = st.dictionaries(
    st.integers(1, 2**31 - 1),
    st.builds(
        lambda incarnation, one, other, whole: Applied(
            incarnation, Position(min(one, other)), Position(max(one, other)), whole
        ),
        lsns, lsns, lsns, st.booleans(),
    ),
)  # fmt: skip


@given(vectors)
def test_what_is_visible_travels_beside_what_is_durable(applied: dict[int, Applied]) -> None:
    assert Heartbeat.unpack(heartbeat(applied=applied).pack()).applied == applied
    keys = pack_applied(applied)
    assert parse_applied(keys["applied"], keys["visible"], keys["partial"]) == applied
    assert all(done.whole for done in parse_applied(keys["applied"], keys["visible"]).values()), "an older version"


@given(vectors, vectors)
def test_what_is_visible_is_never_less_than_what_is_durable(
    durable: dict[int, Applied], other: dict[int, Applied]
) -> None:
    """A member may leave the key out, or send what does not belong together."""
    told = pack_applied(durable)["applied"]
    choices: list[Any] = [None, {}, pack_applied(other)["visible"], pack_applied(other)["applied"]]
    for visible in choices:
        found = parse_applied(told, visible)
        assert {cid: done.position for cid, done in found.items()} == {
            cid: done.position for cid, done in durable.items()
        }
        assert all(done.visible >= done.position for done in found.values())
