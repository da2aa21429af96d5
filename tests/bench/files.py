"""Trees of files beside `rsync -a --delete`: python -m tests.bench.files [--scale S] [--rounds N] [--only …].

Two nodes on this machine, each with a broker and a files worker. rsync copies between two directories: no network, no
encryption, and nothing is brought to the disk. So rsync's figures are the best it can do, ours have two brokers, CURVE
and a loopback connection in them, and what is placed is on the disk. They take turns on the same files.

Give it a directory (`--directory`) where few files were deleted in the last five minutes, by a run before this one
above all. ext4 does not use their inodes again so soon, and looks at each of them for every file that is made: opening
a new one took 70 to 360 us instead of 12, whoever did it.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from tests.bench.processes import Meter, server_cpu_s
from tests.bench.report import percentile
from tests.bench.row_lag import RowLag
from tests.harness.cluster import Cluster, Node

NEW_FILES, NEW_BYTES = 20_000, 20_000
TREE_FILES, SMALL_BYTES, CHANGED = 100_000, 200, 100
RATE_PER_S, RATE_S, RATE_BYTES = 1000, 10, 2000
REST_S, LAG_S = 60.0, 5.0
ROWS, SHARES = 200_000, (100, 20)
IN_DIRECTORY = 200
LINES = ("new", "beside", "changed", "rest", "verify", "rate")
PROFILE = """
name = "files"
all_tables = true
[[files]]
kind = "spool"
root = "/spool"
setting = "spool_root"
tree = "cluster/{cid}"
"""
EXTRA = '[files]\nspool_root = "{directory}/spool"'


def write_files(root: Path, count: int, size: int) -> None:
    """Write files, none of them like another of this or any other call."""
    for number in range(count):
        path = root / f"{number // IN_DIRECTORY:04d}"
        if number % IN_DIRECTORY == 0:
            path.mkdir(parents=True, exist_ok=True)
        (path / str(number)).write_bytes(os.urandom(size))


def files_of(root: Path) -> Iterator[Path]:
    """Yield a tree's files; pmgsync's own are left out."""
    for at, directories, names in os.walk(root):
        if ".pmgsync" in directories:
            directories.remove(".pmgsync")
        yield from (Path(at, name) for name in names)


def await_files(names: Iterable[Path], within_s: float = 300.0) -> None:
    """Wait until all of these files are there; little is looked at, for that takes time from who is measured."""
    deadline = time.monotonic() + within_s
    missing = list(names)
    while missing:
        if missing[-1].exists():
            missing.pop()
        elif time.monotonic() > deadline:
            raise SystemExit(f"{len(missing)} files are missing after {within_s:.0f} s, {missing[-1]} among them")
        else:
            time.sleep(0.02)


class Rsync:
    """`rsync -a --delete` into one directory.

    Attributes:
        cpu_s: CPU seconds of all processes of the newest run.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.cpu_s = 0.0

    def __call__(self, source: Path, below: str = "") -> float:
        """Run it, and return the seconds it took."""
        before, begun = os.times(), time.monotonic()
        target = self._target / below
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["rsync", "-a", "--delete", "--exclude=.pmgsync", f"{source}/", f"{target}/"], check=True)
        took, after = time.monotonic() - begun, os.times()
        self.cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        return took


class Bench:
    """Both nodes, and what was measured of them: rows of the table."""

    def __init__(self, directory: Path, scale: float, rounds: int, rsync: Rsync | None) -> None:
        self.rows: list[tuple[str, str, float | None, float]] = []
        self.costs: list[str] = []
        self._directory = directory
        self._scale = scale
        self._rounds = rounds
        self._rsync = rsync
        profile = directory / "files.toml"
        profile.write_text(PROFILE)
        schema = (
            "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE mail (id int PRIMARY KEY, sender text, subject text)"
        )
        self.cluster = Cluster(directory / "cluster", profile=str(profile), schema=schema, extra=EXTRA)
        self.cluster.start()
        for node in self.cluster.nodes:
            (node.directory / "spool").mkdir(exist_ok=True)
        self.here, self.there = (node.directory / "spool/cluster/1" for node in self.cluster.nodes)
        self.here.mkdir(parents=True, exist_ok=True)
        self._files = 0

    def count(self, full: int) -> int:
        """Return how many of the full run's files are used."""
        return max(1, int(full * self._scale))

    def _row(self, what: str, unit: str, theirs: list[float], ours: list[float]) -> None:
        self.rows.append((what, unit, statistics.median(theirs) if theirs else None, statistics.median(ours)))

    def _turns(self, theirs: Callable[[int], float], ours: Callable[[int], float]) -> tuple[list[float], list[float]]:
        """Take both in turns, and change who is first: the second finds files in memory that the first had to read."""
        found: tuple[list[float], list[float]] = ([], [])
        for number in range(self._rounds):
            for who in (0, 1) if number % 2 else (1, 0):
                if who == 1:
                    found[1].append(ours(number))
                elif self._rsync is not None:
                    found[0].append(theirs(number))
        return found

    def _processes(self) -> dict[int, str]:
        def of(number: int, node: Node) -> dict[int, str]:
            role = "owner" if number == 0 else "receiver"
            return {node.workers()["files"].pid: f"{role}: files", node.processes["broker"].pid: f"{role}: broker"}

        return {pid: name for number, node in enumerate(self.cluster.nodes) for pid, name in of(number, node).items()}

    def _cost(self, what: str, meter: Meter) -> None:
        spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(meter.cpu_s.items()))
        peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in sorted(meter.peak_mib.items()))
        self.costs.append(f"{what}: CPU s {spent}; private MiB {peaks}")

    # -- lines --------------------------------------------------------------------------------------------------------

    def new(self) -> None:
        """Many new files of the size of a mail."""
        number = self.count(NEW_FILES)

        def source(turn: int) -> Path:
            """Return the files of a turn, wherever they lie by now."""
            at, moved = self._directory / f"new{turn}", self.here / f"new{turn}"
            if not at.exists() and not moved.exists():
                write_files(at, number, NEW_BYTES)
                os.sync()
            return moved if moved.exists() else at

        def theirs(turn: int) -> float:
            assert self._rsync is not None
            took, begun = self._rsync(source(turn), f"new{turn}"), time.monotonic()
            os.sync()
            to_disk = time.monotonic() - begun
            self.costs.append(f"rsync of as many: CPU s {self._rsync.cpu_s:.2f}; on the disk {to_disk:.1f} s later")
            return took

        def ours(turn: int) -> float:
            files = source(turn)
            wanted = [self.there / files.name / each.relative_to(files) for each in files_of(files)]
            with Meter(self._processes, sample=True) as meter:
                begun = time.monotonic()
                files.rename(self.here / files.name)
                self._files += number
                await_files(wanted)
                took = time.monotonic() - begun
            self._cost(f"{number} new files", meter)
            return took

        self._row(f"{number} new files of {NEW_BYTES // 1000} KB", "s", *self._turns(theirs, ours))

    def grow(self) -> None:
        """Fill the tree up."""
        more = self.count(TREE_FILES) - self._files
        if more > 0:
            write_files(self._directory / "more", more, SMALL_BYTES)
            (self._directory / "more").rename(self.here / "more")
            self._files += more
            await_files(self.there / path.relative_to(self.here) for path in files_of(self.here))
        if self._rsync is not None:
            self._rsync(self.here)
        # What rsync leaves unwritten would be written by the other's syncfs.
        os.sync()

    def beside(self) -> None:
        """Rows while many new files are copied."""
        number, master, other = self.count(NEW_FILES), *self.cluster.nodes
        with RowLag(master, other) as quiet:
            time.sleep(LAG_S)
        files = self._directory / "beside"
        write_files(files, number, NEW_BYTES)
        os.sync()
        wanted = [self.there / files.name / each.relative_to(files) for each in files_of(files)]
        with RowLag(master, other) as busy:
            begun = time.monotonic()
            files.rename(self.here / files.name)
            await_files(wanted)
            took = time.monotonic() - begun
        self._files += number
        self.costs.append(
            f"rows at rest: {quiet.text()}; while {number} files were copied in {took:.1f} s: {busy.text()}"
        )
        what = f"a row while {number} new files of {NEW_BYTES // 1000} KB are copied"
        for word, share in (("median", 0.5), ("99th percentile", 0.99)):
            self._row(f"{what}: {word}", "ms", [], [percentile(busy.lags_ms, share)])

    def verify(self) -> None:
        """`pmgcm verify` while rows are written."""
        number, (master, other) = self.count(ROWS), self.cluster.nodes
        master.sql(
            "INSERT INTO mail SELECT id, md5(id::text) || '@example.com', repeat(md5(id::text), 3)"
            f" FROM generate_series(1, {number}) AS id ON CONFLICT DO NOTHING"
        )
        self.cluster.wait()
        for share in SHARES:
            servers = -self._servers_cpu_s()
            with Meter(self._agents, sample=True) as meter, RowLag(master, other) as lag:
                begun = time.monotonic()
                said = master.pmgcm("verify", "--share", str(share), timeout_s=900).stdout.strip()
                took = time.monotonic() - begun
            servers += self._servers_cpu_s()
            self._cost(f"verify --share {share}: {took:.1f} s, {said}; {lag.text()}; servers {servers:.2f}", meter)
            what = f"pmgcm verify --share {share}: {number} rows, {self._files} files, two nodes"
            self._row(what, "s", [], [took])

    def _servers_cpu_s(self) -> float:
        return sum(server_cpu_s(node.server.pid) for node in self.cluster.nodes)

    def _agents(self) -> dict[int, str]:
        found = self._processes()
        for node in self.cluster.nodes:
            found |= {
                process.pid: f"{node.name}: {name}" for name, process in node.workers().items() if name != "files"
            }
        return found

    def changed(self) -> None:
        """A few files of a large tree are written anew."""
        names = sorted(files_of(self.here))
        rng = random.Random(1)

        def edit(turn: int) -> list[Path]:
            chosen = rng.sample(names, min(CHANGED, len(names)))
            for path in chosen:
                path.write_bytes(os.urandom(301 + turn))
            return chosen

        def theirs(turn: int) -> float:
            assert self._rsync is not None
            edit(turn)
            return self._rsync(self.here)

        def ours(turn: int) -> float:
            os.sync()
            last = {self.there / path.relative_to(self.here): path.read_bytes() for path in edit(turn)}
            begun = time.monotonic()
            while last:
                last = {path: data for path, data in last.items() if path.read_bytes() != data}
                time.sleep(0.002)
            return time.monotonic() - begun

        self._row(f"{CHANGED} files changed in a tree of {self._files}", "s", *self._turns(theirs, ours))

    def rest(self) -> None:
        """Nothing happens: what a run of rsync costs, and what a second at rest does."""
        runs = []
        for _ in range(self._rounds if self._rsync is not None else 0):
            assert self._rsync is not None
            self._rsync(self.here)
            runs.append(self._rsync.cpu_s)
        time.sleep(3.0)
        with Meter(self._processes) as meter:
            time.sleep(REST_S)
        self._cost(f"{REST_S:.0f} s at rest with {self._files} files", meter)
        workers = sum(seconds for name, seconds in meter.cpu_s.items() if name.endswith("files"))
        row = f"nothing changed in a tree of {self._files}: CPU of a run; of both files workers in a second"
        self._row(row, "ms", [1000 * each for each in runs], [1000 * workers / REST_S])

    def rate(self) -> None:
        """New files at a steady rate: how long each takes to arrive."""
        flow, total = self.here / "flow", self.count(RATE_PER_S * RATE_S)
        made: dict[str, float] = {}
        seen: dict[str, float] = {}
        flow.mkdir()
        begun, data = time.monotonic(), os.urandom(RATE_BYTES)
        for number in range(total):
            time.sleep(max(0.0, begun + number / RATE_PER_S - time.monotonic()))
            made[str(number)] = time.monotonic()
            (flow / str(number)).write_bytes(data + str(number).encode())
            if number % 20 == 0:
                _note(self.there / "flow", seen)
        while len(seen) < total and time.monotonic() - begun < RATE_S * 6:
            _note(self.there / "flow", seen)
            time.sleep(0.005)
        self._files += total
        lags = [1000 * (at - made[name]) for name, at in seen.items()]
        what = f"{RATE_PER_S} new files a second ({len(lags)} of {total} arrived)"
        for word, share in (("median", 0.5), ("99th percentile", 0.99)):
            self._row(f"{what}, {word}", "ms", [], [percentile(lags, share)])


def _note(root: Path, seen: dict[str, float]) -> None:
    now = time.monotonic()
    if root.is_dir():
        with os.scandir(root) as entries:
            for each in entries:
                seen.setdefault(each.name, now)


def find_rsync(target: Path) -> tuple[Rsync | None, str]:
    """Return what runs rsync, None when it is not installed, and its version or what to do."""
    if shutil.which("rsync") is None:
        return None, "rsync is NOT INSTALLED: its column stays empty (apt-get install rsync)"
    said = subprocess.run(["rsync", "--version"], check=True, capture_output=True, text=True).stdout
    return Rsync(target), " ".join(said.split()[:3])


def table(rows: list[tuple[str, str, float | None, float]]) -> str:
    """Return the rows as a Markdown table; the ratio says how many times less ours is."""
    lines = ["| work | unit | rsync | pmgsync | rsync / pmgsync |", "|---|---|---|---|---|"]
    for what, unit, theirs, ours in rows:
        figures = ("", "") if theirs is None else (f"{theirs:.2f}", f"{theirs / ours:.1f}" if ours else "")
        lines.append(f"| {what} | {unit} | {figures[0]} | {ours:.2f} | {figures[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Run it in a directory of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(LINES), help=f"lines, of {', '.join(LINES)}")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp/pmgsync-bench-files"))
    chosen = parser.parse_args()
    lines = [line for line in LINES if line in chosen.only.split(",")]
    shutil.rmtree(chosen.directory, ignore_errors=True)
    chosen.directory.mkdir(parents=True)
    rsync, version = find_rsync(chosen.directory / "rsync")
    cores, memory = psutil.cpu_count(), psutil.virtual_memory().total >> 30
    print(f"{version}; Python {platform.python_version()}, {cores} cores, {memory} GiB; load {os.getloadavg()[0]:.1f}")
    sys.stdout.flush()
    bench = None
    try:
        bench = Bench(chosen.directory, chosen.scale, chosen.rounds, rsync)
        for line in lines:
            if line in {"changed", "rest", "verify"}:
                bench.grow()
            getattr(bench, line)()
        print("\n".join(["", *bench.costs, "", table(bench.rows)]))
    finally:
        if bench is not None:
            bench.cluster.close()
        shutil.rmtree(chosen.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
