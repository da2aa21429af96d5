"""Trees of files under faults of the network and the disk, in the middle of transfers, on both sides."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, eventually
from tests.harness.network import Network
from tests.scenarios.test_files import Files, arrives, large, listing, trees

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]


def test_a_network_that_is_cut_again_and_again(
    new_cluster: Callable[..., Cluster], new_network: Callable[[int], Network], tmp_path: Path
) -> None:
    links = new_network(2)
    files = Files(new_cluster, tmp_path, 2, namespaces=links.names)
    master, other = files.cluster.nodes
    arrives(files.spool(1, 1), files.spool(2, 1))
    rng = random.Random(3)
    for number, cut_s in enumerate((0.5, 12.0, 4.0)):
        for owner in (1, 2):
            for each in range(300):
                path = files.spool(owner, owner) / f"spam/{each % 16:02x}/{number}-{each}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(rng.randbytes(rng.randrange(40_000)))
            large(files.spool(owner, owner) / f"virus/{number}", 32 << 20, 10 * number + owner)
        (files.etc(1) / "main.conf").write_text(f"changed {number}")
        time.sleep(rng.random())  # where it is hit is left to chance
        links.cut(2)
        time.sleep(cut_s)
        if number == 2:
            for node in (master, other):
                node.workers()["files"].send_signal(signal.SIGKILL)
        links.heal(2)
    healed = time.monotonic()
    arrives(files.spool(1, 1), files.spool(2, 1), within_s=90)
    arrives(files.spool(2, 2), files.spool(1, 2), within_s=90)
    eventually(lambda: (files.etc(2) / "main.conf").read_text() == "changed 2")
    print(f"in step {time.monotonic() - healed:.1f} s after the last cut")
    eventually(lambda: not any(tree["behind"] or tree["error"] for tree in trees(master, 2).values()))


def test_a_full_disk_shows_no_half_of_a_configuration(new_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    files = Files(new_cluster, tmp_path, 2)
    master, other = files.cluster.nodes
    eventually((files.etc(2) / "conf.d/a.conf").exists)
    other.stop()
    before = {path: path.read_bytes() for path in files.etc(2).rglob("*") if path.is_file()}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", files.etc(2)], check=True)
    try:
        for path, data in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        other.start()
        eventually(lambda: trees(master, 2) and not any(tree["error"] for tree in trees(master, 2).values()))
        old = listing(files.etc(2))
        # Smaller than the room at first, so it is found while it is written.
        large(files.etc(2) / "own.pem", 3 << 20, 1)
        large(files.etc(1) / "conf.d/large.conf", 2 << 20, 2)
        for number in range(20):
            (files.etc(1) / f"conf.d/{number}.conf").write_text("new")
        eventually(lambda: [tree for tree in trees(master, 2).values() if tree["error"]])
        assert {name: each for name, each in listing(files.etc(2)).items() if name != "own.pem"} == old
        master.sql("INSERT INTO t VALUES (1)")
        eventually(lambda: other.content("t") == ["(1)"], what="rows go on")
        (files.etc(2) / "own.pem").unlink()
        eventually((files.etc(2) / "conf.d/19.conf").exists)
        (files.etc(1) / "own.pem").unlink()
        arrives(files.etc(1), files.etc(2))
    finally:
        other.stop()
        subprocess.run(["umount", files.etc(2)], check=True)


def test_a_full_disk_of_the_owner(new_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """What the owner notes of its trees lies in its state directory."""
    files = Files(new_cluster, tmp_path, 2)
    master, _ = files.cluster.nodes
    arrives(files.spool(1, 1), files.spool(2, 1))
    master.stop()
    content = tmp_path / "content"
    subprocess.run(["cp", "-a", master.state_dir, content], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", master.state_dir], check=True)
    try:
        subprocess.run(["cp", "-a", f"{content}/.", master.state_dir], check=True)
        master.state_dir.chmod(0o700)
        master.start()
        eventually(lambda: trees(master, 2))
        filling = master.state_dir / "filling"
        with filling.open("wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        for number in range(200):
            (files.spool(1, 1) / f"spam/full-{number}").write_text(str(number))
        time.sleep(3)
        filling.unlink()
        arrives(files.spool(1, 1), files.spool(2, 1), within_s=60)
        eventually(lambda: not any(tree["error"] for tree in trees(master, 1).values()))
    finally:
        master.stop()
        subprocess.run(["umount", master.state_dir], check=True)
