"""The lines of the benchmark: how one turn of each system goes, and what it gives."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tests.bench import work
from tests.bench.processes import Meter, Processes
from tests.bench.servers import ask, await_mark, connect, wal_lsn, watching

LATENCY_POLL_S = 0.0001
RATE_PER_S, RATE_S = 1000, 20


class System(Protocol):
    """What both systems do when asked. `subscribers` are connection strings."""

    name: str
    commit: str
    publisher: str
    subscribers: Sequence[str]

    def start(self) -> None: ...
    def new_mark(self) -> int: ...
    def with_commit(self, commit: str) -> None: ...
    def settle(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def cut(self) -> None: ...
    def captured(self, lsn: str) -> None: ...
    def mend(self) -> float: ...
    def processes(self) -> Processes: ...
    def close(self) -> None: ...


@dataclass
class Turn:
    """What one turn of one system gave.

    Attributes:
        seconds: until everything was visible; of a latency line the median.
        latencies_ms: of each transaction, from the return of its commit until it was visible.
        cpu_s: CPU seconds by process.
        peak_mib: private memory by process.
        changes: row changes that were applied.
    """

    seconds: float
    changes: int
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        run: takes a turn; arguments: system, size, number of the turn.
        size: of the work at scale 1.
        needs: what it runs in.
        rounds: turns of each, when they are not as many as usual.
        both_commits: each system takes turns with both settings of synchronous_commit.
    """

    name: str
    title: str
    size: int
    needs: Literal["live", "cut", "fanout"]
    run: Callable[[System, int, int], Turn]
    is_latency: bool = False
    rounds: int = 0
    both_commits: bool = True
    smallest: int = 100


def _mark(system: System) -> int:
    mark = system.new_mark()
    ask(system.publisher, "INSERT INTO mark VALUES (%s)", (mark,))
    return mark


def _catch_up(system: System, changes: int, load: Callable[[], None]) -> Turn:
    """Write while the connection is cut; measure from the connection until all is visible."""
    system.cut()
    with Meter(system.processes) as meter:
        load()
        mark = _mark(system)
        system.captured(wal_lsn(system.publisher))
        begun = system.mend()
        ended = await_mark(system.subscribers, mark)
    return Turn(ended - begun, changes, meter.cpu_s)


def large(system: System, rows: int, number: int) -> Turn:
    """One transaction of inserts; measured from its commit."""
    return _large(system, rows, sample=False)


def huge(system: System, rows: int, number: int) -> Turn:
    """The same, with everybody's memory."""
    return _large(system, rows, sample=True)


def _large(system: System, rows: int, *, sample: bool) -> Turn:
    ask(system.publisher, "TRUNCATE big")
    system.settle()
    mark = system.new_mark()
    with Meter(system.processes, sample=sample) as meter:
        work.fill_big(system.publisher, 1, rows, mark)
        begun = time.monotonic()
        ended = await_mark(system.subscribers, mark)
    return Turn(ended - begun, rows, meter.cpu_s, meter.peak_mib if sample else {})


def mail(system: System, count: int, number: int) -> Turn:
    """Transactions of three rows."""
    ask(system.publisher, "TRUNCATE mail, receiver")
    system.settle()
    return _catch_up(system, 3 * count, lambda: work.write_mail(system.publisher, 1, count))


def tpcb(system: System, count: int, number: int) -> Turn:
    """Transactions of pgbench."""
    scale = ask(system.publisher, "SELECT count(*) FROM pgbench_branches")[0][0]
    return _catch_up(system, 4 * count, lambda: work.run_pgbench(system.publisher, scale, count, number))


def keys(system: System, rows: int, number: int) -> Turn:
    """Inserts, as many updates and half as many deletes by key; no row is changed twice."""
    ask(system.publisher, "TRUNCATE item")
    work.insert_items(system.publisher, 1, rows + rows // 2)
    system.settle()

    def load() -> None:
        work.insert_items(system.publisher, 10 * rows, rows)
        work.update_items(system.publisher, 1, rows)
        work.delete_items(system.publisher, rows + 1, rows // 2)

    return _catch_up(system, 2 * rows + rows // 2, load)


def keyless(system: System, rows: int, number: int) -> Turn:
    """Updates and deletes without a key, of a table with ten times as many rows; from the last commit."""
    ask(system.publisher, "TRUNCATE keyless")
    work.fill_keyless(system.publisher, 10 * rows)
    system.settle()
    with Meter(system.processes) as meter:
        work.change_keyless(system.publisher, rows)
        mark = _mark(system)
        begun = time.monotonic()
        ended = await_mark(system.subscribers, mark)
    return Turn(ended - begun, rows + rows // 2, meter.cpu_s)


def single(system: System, count: int, number: int) -> Turn:
    """One transaction at a time: the next is written when the one before is visible."""
    found: list[float] = []
    first = ask(system.publisher, "SELECT coalesce(max(id), 0) + 1 FROM tick")[0][0]
    with (
        Meter(system.processes) as meter,
        watching(system.publisher, "INSERT INTO tick VALUES (%s) RETURNING 1") as write,
        watching(system.subscribers[0], "SELECT 1 FROM tick WHERE id = %s") as visible,
    ):
        for tick in range(first, first + count):
            write(tick)
            committed = time.perf_counter()
            while not visible(tick):
                time.sleep(LATENCY_POLL_S)
            found.append((time.perf_counter() - committed) * 1000)
    return _latencies(found, count, meter)


def rate(system: System, count: int, number: int) -> Turn:
    """A steady thousand transactions a second; each one's time from its commit until it is visible."""
    first = ask(system.publisher, "SELECT coalesce(max(id), 0) + 1 FROM tick")[0][0]
    with Meter(system.processes) as meter:
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.writer", system.publisher, str(first), str(count), str(RATE_PER_S)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        seen = list(_seen(system.subscribers[0], first, first + count - 1))
        committed = [float(line) for line in writer.communicate()[0].splitlines()]
    if writer.returncode or len(committed) != count:
        raise RuntimeError("the writer has failed")
    return _latencies([(when - committed[tick - first]) * 1000 for tick, when in seen], count, meter)


def _seen(dsn: str, first: int, last: int) -> Iterator[tuple[int, float]]:
    """Yield each id with the time when it was first seen; they become visible in order."""
    connection = connect(dsn)
    with connection.cursor() as cursor:
        at = first - 1
        while at < last:
            cursor.execute("SELECT max(id) FROM tick")
            newest, now = cursor.fetchone()[0] or 0, time.monotonic()  # type: ignore[index]
            yield from ((tick, now) for tick in range(at + 1, newest + 1))
            at = max(at, newest)
            time.sleep(LATENCY_POLL_S)
    connection.close()


def _latencies(found: list[float], count: int, meter: Meter) -> Turn:
    return Turn(sorted(found)[len(found) // 2] / 1000, count, meter.cpu_s, latencies_ms=found)


def fanout(system: System, count: int, number: int) -> Turn:
    """Mail transactions while all subscribers are connected; from the last commit until all have all."""
    ask(system.publisher, "TRUNCATE mail, receiver")
    system.settle()
    with Meter(system.processes) as meter:
        work.write_mail(system.publisher, 1, count)
        mark = _mark(system)
        begun = time.monotonic()
        ended = await_mark(system.subscribers, mark)
    return Turn(ended - begun, 3 * count, meter.cpu_s)


LINES = (
    Line("large", "one transaction of {:,} inserts, key and two indexes", 500_000, "live", large),
    Line("mail", "catch-up on {:,} mail transactions, 3 rows each", 100_000, "cut", mail),
    Line("tpcb", "catch-up on {:,} TPC-B transactions", 100_000, "cut", tpcb),
    Line("keys", "catch-up on {:,} inserts, as many updates, half as many deletes by key", 200_000, "cut", keys),
    Line("keyless", "{:,} updates, half as many deletes, no key, REPLICA IDENTITY FULL", 4_000, "live", keyless),
    Line("single", "one transaction at a time, {:,} times", 2_000, "live", single, is_latency=True),
    Line("rate", f"{{:,}} transactions, {RATE_PER_S} a second", RATE_PER_S * RATE_S, "live", rate, True, smallest=2000),
    Line("huge", "one transaction of {:,} inserts, with memory", 5_000_000, "live", huge, rounds=1, both_commits=False),
)  # fmt: skip
FANOUT = Line("fanout", "{:,} mail transactions to each of the slaves", 20_000, "fanout", fanout, both_commits=False)
