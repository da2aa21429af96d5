"""The table of `pmgcm status`, the goal of `pmgcm wait`, and the small pure parts of the command line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.cluster_checks import check_cluster
from cli.console import amount, duration, printable
from cli.demo.compare import Content, differences
from cli.demo.latency import Latency, percentile
from cli.join_cmd import parse_ttl
from cli.progress import estimate_left_s
from cli.status import format_uptime, in_sync, notes, render, synchronous_lines
from cli.wait import Behind, Goal
from pmgsync.core.membership import Member, first_document
from pmgsync.core.positions import format_lsn
from pmgsync.errors import PmgsyncError
from pmgsync.profile_file import load_profile


def node(cid: int = 5, **changes: Any) -> dict[str, Any]:
    """Return a node of a status map, in sync unless said otherwise."""
    return {
        "cid": cid,
        "name": f"pmg{cid}",
        "ip": "192.168.2.127",
        "role": "master" if cid == 1 else "node",
        "state": "A",
        "error": None,
        "uptime_s": 86_400 + 21 * 3600 + 18 * 60,
        "load1": 0.3,
        "mem_pct": 80.2,
        "disk_pct": 41.0,
        "positions": {},
        "visible": {},
        "head": None,
        "watermark": None,
        "lag_bytes": 0,
        "lag_s": 0.0,
        "waiting_for": [],
        "alerts": [],
        **changes,
    }


def status(*nodes: dict[str, Any]) -> dict[str, Any]:
    return {"cluster": "test", "epoch": 1, "nodes": list(nodes)}


HEADER = "NAME(CID)--------------IPADDRESS----ROLE-STATE---------UPTIME---LOAD----MEM---DISK"


def test_the_table_is_the_one_administrators_know() -> None:
    row = node(1, name="pmg5")
    assert render(status(row)) == [
        HEADER,
        "pmg5(1)              192.168.2.127   master A    1 day 21:18   0.30    80%    41%",
    ]


def test_addresses_are_aligned_on_the_right_and_roles_on_the_left() -> None:
    lines = render(status(node(1), node(2, ip="10.0.0.2", state="S")))
    assert lines[1].index("master") == lines[2].index("node")
    assert lines[1].index("   master") == lines[2].index("   node") == 34
    assert lines[2].startswith("pmg2(2)                   10.0.0.2   node   S")


def test_a_node_that_is_down_shows_its_error_in_place_of_figures() -> None:
    down = node(2, state="ERROR", error="nothing heard for 4 s", uptime_s=None, load1=None)
    assert render(status(node(1), down))[2].endswith("   node   ERROR: nothing heard for 4 s")


def test_what_is_not_known_yet_is_a_dash() -> None:
    fresh = node(2, state="S", uptime_s=None, load1=None, mem_pct=None, disk_pct=None)
    assert render(status(fresh))[1].split() == ["pmg2(2)", "192.168.2.127", "node", "S", "-", "-", "-", "-"]


def test_long_names_and_addresses_widen_the_table_for_all_rows() -> None:
    long = node(2, name="gateway-in-the-cellar", ip="2001:db8:1234:5678:9abc:def0:1234:5678")
    lines = render(status(node(1), long))
    assert len(lines[0]) - len(lines[1]) == len(HEADER) - 81
    assert len(lines[1]) == len(lines[2])


def test_alerts_stand_below_the_table_and_say_whose_they_are() -> None:
    full = node(
        2, alerts=[{"kind": "journal", "text": "3.9 of 4.0 GiB"}, {"kind": "journal", "text": "3.9 of 4.0 GiB"}]
    )
    assert render(status(node(1), full))[3:] == ["pmg2(2): journal: 3.9 of 4.0 GiB"]


def test_an_alert_does_not_repeat_the_error() -> None:
    assert notes(node(2, state="ERROR", error="gone", alerts=[{"kind": "error", "text": "gone"}])) == []


def test_conflicts_stand_below_the_table_the_most_frequent_first() -> None:
    counted = {f"public.t.c{n}": n for n in range(1, 7)} | {"other": 3}
    text = "conflicts: 24 values lost against others: "
    text += "public.t.c6 6, public.t.c5 5, public.t.c4 4, other 3, public.t.c3 3, 2 more"
    assert notes(node(2, conflicts=counted)) == [text]
    assert notes(node(2, conflicts={"public.\x1bt.c": 1})) == ["conflicts: 1 value lost against others: public. t.c 1"]
    assert notes(node(2, conflicts={})) == []


def test_clocks_that_differ_are_told_where_they_matter() -> None:
    nodes = [node(1, clock_skew_s=0.0), node(2, clock_skew_s=1.26), node(3, clock_skew_s=-90.0), node(4)]
    nodes += [node(5, clock_skew_s=-1.0), node(6, clock_skew_s=None)]
    assert render(status(*nodes), clocks_matter=True)[7:] == [
        "pmg2(2): clock: about 1.3 s ahead of this node's; rules that take the latest value compare clocks",
        "pmg3(3): clock: about 90.0 s behind this node's; rules that take the latest value compare clocks",
    ]
    assert render(status(*nodes))[7:] == []


@pytest.mark.parametrize(("name", "ok"), [("pmg", False), ("mirror", True)])
def test_the_doctor_fails_for_clocks_only_where_they_matter(name: str, ok: bool) -> None:
    member = Member(1, "pmg1", "192.0.2.11", 1, 2, 3, b"c" * 32, b"s" * 32)
    document = first_document(b"0" * 16, "test", name, member)
    nodes = status(node(1, clock_skew_s=0.0), node(2, clock_skew_s=-2.0))
    found = [each for each in check_cluster(nodes, document, load_profile(name)) if each.check == "clocks"]
    assert [each.ok for each in found] == [ok]
    assert found[0].problem == "the clock of pmg2(2) is about 2.0 s behind this node's"
    assert ("latest value" in found[0].remedy) is not ok


def test_a_node_that_lags_says_by_how_much() -> None:
    assert notes(node(2, state="S", lag_s=7.25, lag_bytes=3 << 20)) == ["7.2 s and 3.0 MiB behind"]


def test_names_and_errors_cannot_speak_to_the_terminal() -> None:
    evil = node(2, state="ERROR", error="\x1b[2Jgone\nok", name="pmg\x07")
    assert all(line.isprintable() for line in render(status(evil)))


def test_every_node_must_be_in_sync() -> None:
    assert in_sync(status(node(1), node(2)))
    assert not in_sync(status(node(1), node(2, state="S")))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00"),
        (359, "00:05"),
        (86_399, "23:59"),
        (86_400, "1 day 00:00"),
        (3 * 86_400 + 61, "3 days 00:01"),
    ],
)
def test_uptime(seconds: int, text: str) -> None:
    assert format_uptime(seconds) == text


# -- wait ------------------------------------------------------------------------------------------------------------


def chains(positions: dict[int, dict[int, int]], heads: dict[int, int], marks: dict[int, int]) -> dict[str, Any]:
    """Return a status map from LSNs: positions by member and origin, heads and watermarks by origin."""
    return status(
        *(
            node(
                cid,
                positions={str(origin): format_lsn(lsn) for origin, lsn in applied.items()},
                head=format_lsn(heads[cid]) if cid in heads else None,
                watermark=format_lsn(marks[cid]) if cid in marks else None,
            )
            for cid, applied in positions.items()
        )
    )


def goal(barriers: dict[int, int]) -> Goal:
    made = Goal()
    for origin, lsn in barriers.items():
        made.barrier(origin, lsn)
    return made


def test_idle_members_are_done_at_once() -> None:
    now = chains({1: {2: 50}, 2: {1: 100}}, heads={1: 100, 2: 50}, marks={1: 120, 2: 60})
    assert goal({1: 110, 2: 60}).behind(now) == []


def test_a_member_that_lacks_the_newest_frame_is_behind() -> None:
    now = chains({1: {2: 50}, 2: {1: 90}}, heads={1: 100, 2: 50}, marks={1: 120, 2: 60})
    assert goal({1: 110, 2: 60}).behind(now) == [Behind(2, 1, "", 10)]


def test_a_chain_that_has_not_reached_its_barrier_may_still_bring_something() -> None:
    now = chains({1: {2: 50}, 2: {1: 100}}, heads={1: 100, 2: 50}, marks={1: 105, 2: 60})
    assert [lag.cid for lag in goal({1: 110, 2: 60}).behind(now)] == [1]


def test_what_is_committed_later_does_not_move_the_goal() -> None:
    waiting = goal({1: 110, 2: 60})
    assert waiting.behind(chains({1: {2: 50}, 2: {1: 90}}, heads={1: 100, 2: 50}, marks={1: 110, 2: 60}))
    later = chains({1: {2: 50}, 2: {1: 100}}, heads={1: 900, 2: 800}, marks={1: 900, 2: 800})
    assert waiting.behind(later) == []


def test_a_busy_chain_is_reached_at_the_barrier_though_its_watermark_stands() -> None:
    busy = goal({1: 110, 2: 60})
    assert busy.behind(chains({1: {2: 50}, 2: {1: 109}}, heads={1: 500, 2: 50}, marks={1: 80, 2: 60}))
    assert busy.behind(chains({1: {2: 50}, 2: {1: 110}}, heads={1: 900, 2: 50}, marks={1: 80, 2: 60})) == []


def test_a_member_that_cannot_be_asked_is_named() -> None:
    asked = goal({1: 110})
    asked.problems[2] = "node 2 is not connected"
    now = chains({1: {2: 50}, 2: {1: 110}}, heads={1: 100, 2: 50}, marks={1: 120, 2: 60})
    assert asked.missing(now) == [2]
    assert asked.behind(now) == [Behind(2, 2, "node 2 is not connected")]


def test_a_chain_that_a_member_has_not_begun_with_is_missing_there() -> None:
    now = chains({1: {}, 2: {1: 110}}, heads={1: 100, 2: 50}, marks={1: 120, 2: 60})
    assert [(lag.cid, lag.origin, lag.lag_bytes) for lag in goal({1: 110, 2: 60}).behind(now)] == [(1, 2, None)]


lsns = st.integers(0, 40)


@given(
    commits=st.lists(lsns, max_size=8, unique=True), barrier=lsns, applied=lsns, later=lsns, published=lsns, mark=lsns
)
def test_done_means_that_everything_before_the_barrier_is_applied(
    commits: list[int], barrier: int, applied: int, later: int, published: int, mark: int
) -> None:
    """Against a model: an origin with these commits, of which its chain holds those up to `published`."""
    chain = [lsn for lsn in commits if lsn <= published]
    head = max(chain, default=0)
    # A watermark claims that nothing below it is missing in the chain; and who applies has frames of the chain only.
    missing = [lsn for lsn in commits if lsn > published]
    mark = min([mark, *missing])
    position = max([lsn for lsn in chain if lsn <= applied], default=0)
    waiting = goal({1: barrier, 2: 0})
    first = chains({1: {2: 0}, 2: {1: position}}, heads={1: head}, marks={1: mark})
    if waiting.behind(first) == []:
        assert all(lsn <= position for lsn in commits if lsn < barrier)
    # Later the whole chain is published; the goal that was fixed before still holds.
    last = max([lsn for lsn in commits if lsn <= max(later, position)], default=0)
    rest = chains({1: {2: 0}, 2: {1: last}}, heads={1: max(commits, default=0)}, marks={1: 50})
    if waiting.behind(rest) == []:
        assert all(lsn <= last for lsn in commits if lsn < barrier)


# -- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h", 3600), ("2D", 172_800), ("5", 5)])
def test_ttl(text: str, seconds: int) -> None:
    assert parse_ttl(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "h", "-1", "1.5h", "1w", "1 h 3"])
def test_what_is_not_a_time_span_is_refused_by_name(text: str) -> None:
    with pytest.raises(PmgsyncError, match="expected a time span"):
        parse_ttl(text)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_percentile_is_a_value_that_enough_values_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert found is not None
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_latency_counts_a_mail_once_for_each_other_node() -> None:
    latency = Latency([1, 2, 3])
    latency.committed(1, 7)
    latency.committed(1, 8)
    latency.visible(1, 2, 7, asked=float("inf"))
    assert (latency.waiting, len(latency.samples)) == (3, 1)
    latency.visible(1, 2, 8, asked=float("inf"))
    latency.visible(1, 3, 9, asked=float("inf"))
    assert (latency.waiting, len(latency.samples)) == (0, 4)


def test_differences_name_the_table_and_the_nodes() -> None:
    same, other = Content(1, "a" * 32), Content(2, "b" * 32)
    assert differences({"pmg1": {"public.rule": same}, "pmg2": {"public.rule": same}}) == []
    (told,) = differences({"pmg1": {"public.rule": same}, "pmg2": {"public.rule": other}, "pmg3": {}})
    assert "public.rule" in told
    assert "pmg2: 2 rows" in told
    assert "pmg3: no table" in told


def test_text_for_people() -> None:
    assert [amount(0), amount(1023), amount(1536), amount(5 << 40)] == ["0 bytes", "1023 bytes", "1.5 KiB", "5.0 TiB"]
    assert [duration(5), duration(245), duration(3723)] == ["0:05", "4:05", "1:02:03"]
    assert printable("a\tb\x1b[0m") == "a b [0m"
    assert estimate_left_s(0, 100, 1.0) is None
    assert estimate_left_s(25, 100, 5.0) == 15.0


def test_synchronous_mode_is_one_line() -> None:
    mode = {
        "slaves": 1,
        "level": "durable",
        "patience_s": 10.0,
        "in_force": True,
        "state": "synchronous",
        "in_step": [2],
        "waiting_s": 0.0,
    }

    def line(**changes: Any) -> str:
        (found,) = synchronous_lines(status(node(1), node(2)) | {"synchronous": mode | changes})
        return found

    begin = "synchronous: commits on the master wait for 1 slave, durable, at most 10 s"
    assert line() == f"{begin}; in step: pmg2(2)"
    assert line(state="degraded", in_step=[]) == f"{begin}; DEGRADED, they do not wait now; in step: none"
    assert line(state="waiting", waiting_s=12.3, in_step=[]) == f"{begin}; WAITING for 12 s; in step: none"
    assert line(state="starting") == f"{begin}; not yet; in step: pmg2(2)"
    assert line(state=None) == begin, "on any other node"
    assert line(state=None, in_force=False) == f"{begin}; not in force yet"
    without_end = "synchronous: commits on the master wait for 2 slaves, visible, without end; in step: pmg2(2)"
    assert line(slaves=2, level="visible", patience_s=None) == without_end
    assert synchronous_lines(status(node(1)) | {"synchronous": mode | {"slaves": 0}}) == []
    assert synchronous_lines(status(node(1))) == []
