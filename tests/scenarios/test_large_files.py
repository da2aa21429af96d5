"""A large file, and a large tree: rows and heartbeats go on, other files do not wait, memory and CPU stay bounded."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.scenarios.test_files import Files, arrives, trees

pytestmark = pytest.mark.cluster
NewCluster = Callable[..., Cluster]
MIB = 1 << 20
GROWN_MIB = 64


def processes(nodes: list[Node]) -> dict[str, psutil.Process]:
    """Return every process of pmgsync."""
    found = {}
    for node in nodes:
        found[f"{node.name} broker"] = psutil.Process(node.processes["broker"].pid)
        found |= {f"{node.name} {name}": process for name, process in node.workers().items()}
    return found


def private_mib(process: psutil.Process) -> float:
    """Return what a process has in memory that it shares with no other."""
    memory = process.memory_info()
    return float(memory.rss - memory.shared) / MIB


class Load:
    """Rows of the master and the time each takes to be readable on the other node; small files beside them; heartbeats;
    the memory of every process. All is looked at until it is ended."""

    def __init__(self, master: Node, other: Node, here: Path, there: Path) -> None:
        self.lags_s: list[float] = []
        self.file_lags_s: list[float] = []
        self.heartbeat_s = 0.0
        self.before = {name: private_mib(process) for name, process in processes([master, other]).items()}
        self.peaks = dict(self.before)
        self._nodes, self._here, self._there = (master, other), here, there
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._rows, self._files, self._look)]
        for thread in self._threads:
            thread.start()

    def _rows(self) -> None:
        master, other = self._nodes
        number = 0
        while not self._stop.wait(0.05):
            number += 1
            begun = time.monotonic()
            master.sql("INSERT INTO t VALUES (%s)", (number,))
            while not other.sql("SELECT 1 FROM t WHERE id = %s", (number,)):
                time.sleep(0.005)
            self.lags_s.append(time.monotonic() - begun)

    def _files(self) -> None:
        number = 0
        while not self._stop.wait(0.2):
            number += 1
            begun = time.monotonic()
            (self._here / f"spam/small{number}").write_text(str(number))
            while not (self._there / f"spam/small{number}").exists() and not self._stop.is_set():
                time.sleep(0.01)
            self.file_lags_s.append(time.monotonic() - begun)

    def _look(self) -> None:
        watched = processes(list(self._nodes))
        while not self._stop.wait(0.1):
            for name, process in watched.items():
                self.peaks[name] = max(self.peaks[name], private_mib(process))
            for node in self._nodes:
                ages = [each["heartbeat_age_s"] or 0.0 for each in node.status()["nodes"]]
                self.heartbeat_s = max(self.heartbeat_s, *ages)

    def end(self) -> None:
        """Stop, and print what was measured."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for name, lags in (("rows", self.lags_s), ("small files", self.file_lags_s)):
            ordered = sorted(lags)
            print(f"{name}: {len(ordered)}, median {ordered[len(ordered) // 2]:.3f} s, longest {ordered[-1]:.3f} s")
        print(f"oldest heartbeat {self.heartbeat_s:.1f} s")
        for name, peak in self.peaks.items():
            print(f"{name}: {self.before[name]:.0f} MiB, at most {peak:.0f} MiB")


@pytest.mark.campaign
@pytest.mark.parametrize("size_mib", [160, 1024])
def test_a_large_file_holds_nothing_up(new_cluster: NewCluster, tmp_path: Path, size_mib: int) -> None:
    files = Files(new_cluster, tmp_path, 2)
    master, other = files.cluster.nodes
    here, there = files.spool(1, 1), files.spool(2, 1)
    arrives(here, there)
    block = os.urandom(4 * MIB)
    staged = tmp_path / "large"
    with staged.open("wb") as file:
        for number in range(size_mib // 4):
            file.write(number.to_bytes(8, "big") + block[8:])
    load = Load(master, other, here, there)
    try:
        time.sleep(1)
        rows, small = len(load.lags_s), len(load.file_lags_s)
        begun = time.monotonic()
        (here / "virus").mkdir(exist_ok=True)
        staged.rename(here / "virus/large")
        eventually((there / "virus/large").exists, within_s=240, what="the large file")
        took = time.monotonic() - begun
        rows, small = len(load.lags_s) - rows, len(load.file_lags_s) - small
    finally:
        load.end()
    print(f"{size_mib} MiB in {took:.1f} s, meanwhile {rows} rows and {small} small files")
    assert (there / "virus/large").stat().st_size == size_mib * MIB
    # They are looked at one after the other: had one waited for the large file, there would be one or two.
    assert rows > 3
    assert small > 3
    for name, peak in load.peaks.items():
        assert peak - load.before[name] < GROWN_MIB, f"{name} has grown to {peak:.0f} MiB"
    assert not [node for node in master.status()["nodes"] if node["state"] == "ERROR"]
    eventually(lambda: trees(master, 2)["/var/spool/gateway/cluster/1"]["behind"] == 0)


@pytest.mark.campaign
def test_a_tree_at_rest_costs_nothing(new_cluster: NewCluster, tmp_path: Path) -> None:
    files = Files(new_cluster, tmp_path, 2)
    master, other = files.cluster.nodes
    here, there = files.spool(1, 1), files.spool(2, 1)
    arrives(here, there)

    def cpu_s() -> dict[str, float]:
        workers = {f"{node.name} files": node.workers()["files"] for node in (master, other)}
        return {name: sum(process.cpu_times()[:2]) for name, process in workers.items()}

    def at_rest(seconds: float) -> dict[str, float]:
        before = cpu_s()
        time.sleep(seconds)
        return {name: spent - before[name] for name, spent in cpu_s().items()}

    count = int(os.environ.get("PMGSYNC_TREE_FILES", "20000"))
    seconds = float(os.environ.get("PMGSYNC_REST_S", "20"))
    empty = at_rest(seconds)
    for number in range(count):
        path = here / f"spam/{number // 500:03x}"
        if number % 500 == 0:
            path.mkdir(parents=True, exist_ok=True)
        (path / str(number)).write_text(str(number))
    eventually(lambda: trees(master, 2)["/var/spool/gateway/cluster/1"]["files"] == count + 30, within_s=300)
    eventually(lambda: trees(master, 2)["/var/spool/gateway/cluster/1"]["behind"] == 0)
    time.sleep(3)
    full = at_rest(seconds)
    print(f"{count} files, {seconds:.0f} s at rest, CPU s: without {empty}, with {full}")
    assert sum(full.values()) - sum(empty.values()) < seconds * 0.01
    # Started again: metadata are looked at, no content is read.
    worker = master.workers()["files"]
    worker.kill()
    begun = time.monotonic()
    eventually(lambda: "files" in master.workers() and master.workers()["files"].pid != worker.pid)
    started = master.workers()["files"]
    (here / "spam/after").write_text("after the start")
    eventually((there / "spam/after").exists, within_s=120)
    spent, read = sum(started.cpu_times()[:2]), started.io_counters().read_chars
    print(f"started in {time.monotonic() - begun:.1f} s with {spent:.1f} CPU s, {read / MIB:.1f} MiB read")
    for name, process in processes([master, other]).items():
        if name.endswith("files"):
            print(f"{name}: {private_mib(process):.0f} MiB private, {process.memory_info().rss / MIB:.0f} MiB resident")
