"""Takes the turns, prints the tables, writes JSON and pictures.

python -m tests.bench [--scale S] [--only LINE,…] [--rounds N] [--defaults] [--no-fsync] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tests.bench import svg
from tests.bench.join import take_join
from tests.bench.lines import FANOUT, LINES, Line, System, Turn
from tests.bench.native import Native
from tests.bench.ours import Ours
from tests.bench.report import Contender, Row, costs, label, memory, rows_of, table
from tests.bench.servers import Servers, compare
from tests.bench.work import SCHEMA, pgbench_schema

ROUNDS = 3
SLAVES = (1, 4, 8)
JOIN = "join"
PGBENCH_SCALE = 10
Turns = dict[Contender, list[Turn]]


class Bench:
    """One run of the benchmark: what was chosen, and what came out."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self.rows: list[Row] = []
        self.turns: dict[str, Turns] = {}
        self.contenders: list[Contender] = [("native", "off"), ("native", "on"), ("ours", "off"), ("ours", "on")]
        self.version = ""

    def wants(self, name: str) -> bool:
        return not self._chosen.only or name in self._chosen.only

    def run(self) -> None:
        """Run the chosen lines."""
        for needs in ("live", "cut"):
            lines = [line for line in LINES if line.needs == needs and self.wants(line.name)]
            if lines:
                schema = SCHEMA + pgbench_schema(PGBENCH_SCALE if self._chosen.scale >= 0.5 else 1)
                with self._systems(schema, may_cut=needs == "cut") as systems:
                    for line in lines:
                        self._take(line, systems)
        if self.wants(FANOUT.name):
            for slaves in SLAVES:
                with self._systems(SCHEMA, slaves=slaves) as systems:
                    self._take(FANOUT, systems, name=f"fanout {slaves}", title=FANOUT.title + f": {slaves}")

        if self.wants(JOIN):
            with Servers(fsync=not self._chosen.no_fsync) as servers:
                self.version = servers.version
                title, turns = take_join(servers, self._chosen.scale, say)
                self.turns[JOIN] = turns
                self.rows += rows_of(JOIN, title, turns, latency=False)

    @contextlib.contextmanager
    def _systems(self, schema: str, *, slaves: int = 1, may_cut: bool = False) -> Iterator[Sequence[System]]:
        """Start servers with both systems on them; none takes part until it is asked to."""
        with ExitStack() as stack:
            say(f"starting servers, a publication with {slaves} subscription(s), a cluster with {slaves} slave(s)")
            servers = stack.enter_context(Servers(fsync=not self._chosen.no_fsync, subscribers=slaves))
            self.version = servers.version
            systems: list[System] = [
                Native(servers, schema),
                Ours(servers, schema, may_cut=may_cut),
            ]
            for system in systems:
                stack.callback(system.close)
                system.start()
                system.pause()
            self._servers = servers
            yield systems

    def _take(self, line: Line, systems: Sequence[System], *, name: str = "", title: str = "") -> None:
        size = max(line.smallest, round(line.size * self._chosen.scale))
        name, title = name or line.name, (title or line.title).format(size)
        turns: Turns = {}
        native, ours = systems
        # Each as it is by default, then the other way round; lines that take long in the former way only.
        order = [(native, "off"), (ours, "on")]
        if line.both_commits and not self._chosen.defaults:
            order += [(native, "on"), (ours, "off")]
        for number in range(1, (self._chosen.rounds or line.rounds or ROUNDS) + 1):
            for system, commit in order:
                self._servers.rest()
                system.with_commit(commit)
                system.resume()
                turn = line.run(system, size, number)
                system.settle()
                system.pause()
                turns.setdefault((system.name, commit), []).append(turn)
                say(f"{name} {number}: {label((system.name, commit))}: {turn.seconds:.3f} s")
        for system in systems:
            same = compare(system.publisher, system.subscribers)
            say(f"{name}: {system.name}: {same:,} rows are the same on both sides")
        self.turns[name] = {who: turns[who] for who in self.contenders if who in turns}
        self.rows += rows_of(name, title, self.turns[name], latency=line.is_latency)

    # -- results

    def text(self) -> str:
        """Return everything that is printed."""
        parts = [f"{self._machine()}\n", table([row for row in self.rows if row.name != JOIN], self.contenders)]
        if JOIN in self.turns:
            parts.append("\n" + table([row for row in self.rows if row.name == JOIN], list(self.turns[JOIN])))
        for name, turns in self.turns.items():
            parts.append(f"\n{name}:\n\n{costs(turns)}")
            if any(turn.peak_mib for taken in turns.values() for turn in taken):
                parts.append(f"\n{memory(turns)}")
        return "\n".join(parts)

    def _machine(self) -> str:
        memory_gib = psutil.virtual_memory().total / (1 << 30)
        fsync = "off" if self._chosen.no_fsync else "on"
        return (
            f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, PostgreSQL {self.version} with fsync = {fsync}, Python "
            f"{platform.python_version()}; each system is named with the synchronous_commit with which it applies"
        )

    def write(self, directory: Path) -> None:
        """Write bench.json and the pictures."""
        directory.mkdir(parents=True, exist_ok=True)
        data: dict[str, Any] = {
            "machine": self._machine(),
            "scale": self._chosen.scale,
            "rows": [
                {**asdict(row), "figures": {label(who): value for who, value in row.figures.items()}}
                for row in self.rows
            ],
            "turns": {
                name: {label(who): [asdict(turn) for turn in taken] for who, taken in turns.items()}
                for name, turns in self.turns.items()
            },
        }
        (directory / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
        for name, turns in self.turns.items():
            latencies = {
                label(who): svg.distribution([max(ms, 0.01) for turn in taken for ms in turn.latencies_ms])
                for who, taken in turns.items()
            }
            if any(latencies.values()):
                picture = svg.chart(
                    f"{name}: from commit until visible", "ms", "% of the transactions", latencies, logarithmic=True
                )
                (directory / f"latency-{name}.svg").write_text(picture)
        scaling = {name: turns for name, turns in self.turns.items() if name.startswith("fanout ")}
        if scaling:
            points: dict[str, list[tuple[float, float]]] = {}
            for name, turns in scaling.items():
                for who, taken in turns.items():
                    spent = statistics.median(
                        sum(cpu for process, cpu in turn.cpu_s.items() if process.startswith("master"))
                        for turn in taken
                    )
                    points.setdefault(label(who), []).append((float(name.split()[1]), spent))
            picture = svg.chart("what the master pays for its slaves", "slaves", "CPU s on the master", points)
            (directory / "scaling.svg").write_text(picture)


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    """Run what the command line says."""
    names = [*(line.name for line in LINES), FANOUT.name, JOIN]
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full work; 0.1 is a first answer")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=0, help=f"turns of each system, {ROUNDS} unless told")
    parser.add_argument("--defaults", action="store_true", help="each with its default synchronous_commit only")
    parser.add_argument("--no-fsync", action="store_true", help="leave the disk out of it")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where JSON and pictures go")
    chosen = parser.parse_args()
    if unknown := set(chosen.only) - set(names):
        parser.error(f"there is no line {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    bench = Bench(chosen)
    # What ends it early, a time limit for example, does not take away what was measured before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        bench.run()
    finally:
        if bench.rows:
            print("\n" + bench.text())
            bench.write(chosen.out)
            print(f"\nwritten: {chosen.out}/bench.json and pictures")


if __name__ == "__main__":
    main()
