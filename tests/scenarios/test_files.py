"""Trees of files on whole clusters: configuration from the master, each node's spool on all the others."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import Cluster, Node, eventually

pytestmark = pytest.mark.cluster
NewCluster = Callable[..., Cluster]

PROFILE = """
name = "files"
all_tables = true

[[files]]
kind = "config"
root = "/etc/gateway"
setting = "config_root"
include = ["main.conf", "conf.d/", "keys/"]
exclude = ["own.pem", "*~"]

[[files]]
kind = "spool"
root = "/var/spool/gateway"
setting = "spool_root"
tree = "cluster/{cid}"
include = ["spam/", "virus/"]

[[actions]]
files = ["/etc/gateway/main.conf"]
run = ["sh", "-c", "date +%s.%N >> $PMGSYNC_TEST_ACTIONS"]

[[actions]]
tables = ["named"]
run = ["sh", "-c", "echo named >> $PMGSYNC_TEST_ACTIONS.tables"]
"""
SCHEMA = """
CREATE TABLE t (id int PRIMARY KEY);
CREATE TABLE loose (a int, b text);
CREATE TABLE named (id int PRIMARY KEY, name text);
"""
EXTRA = '[files]\nconfig_root = "{directory}/etc"\nspool_root = "{directory}/spool"'


class Files:
    """A cluster with trees.

    Attributes:
        actions: each line is one run of the action for main.conf, on any node.
    """

    def __init__(
        self, new_cluster: NewCluster, tmp_path: Path, nodes: int, *, namespaces: Sequence[str] = (), more: str = ""
    ) -> None:
        """`more`: of the profile."""
        profile = tmp_path / "files.toml"
        profile.write_text(PROFILE + more)
        self.actions = tmp_path / "actions"
        os.environ["PMGSYNC_TEST_ACTIONS"] = str(self.actions)
        self.cluster = new_cluster(
            nodes=nodes, profile=str(profile), extra=EXTRA, seed=seed, schema=SCHEMA, namespaces=namespaces
        )

    def etc(self, number: int) -> Path:
        return self.cluster.nodes[number - 1].directory / "etc"

    def spool(self, number: int, owner: int) -> Path:
        return self.cluster.nodes[number - 1].directory / f"spool/cluster/{owner}"


def listing(root: Path, *, kept: bool = False) -> dict[str, tuple[int, bytes | None]]:
    """Return what a directory holds but for pmgsync's own: mode and content by name."""
    found: dict[str, tuple[int, bytes | None]] = {}
    for path in root.rglob("*"):
        name = os.fsencode(path.relative_to(root)).decode("latin-1")
        if name.startswith(".pmgsync") or (not kept and ".pmgsync-" in name):
            continue
        found[name] = (path.stat().st_mode & 0o7777, path.read_bytes() if path.is_file() else None)
    return found


def same(*roots: Path) -> bool:
    """True when directories hold the same."""
    try:
        first, *others = map(listing, roots)
    except FileNotFoundError:
        return False
    return all(other == first for other in others)


def arrives(*roots: Path, within_s: float = 30.0) -> None:
    """Wait until directories hold the same."""
    eventually(lambda: same(*roots), within_s=within_s, what=f"the same files in {', '.join(map(str, roots))}")


def trees(node: Node, cid: int) -> dict[str, dict[str, Any]]:
    """Return a node's part of the status by tree."""
    return {tree["tree"]: tree for tree in node.node_status(cid)["trees"]}


def seed(node: Node) -> None:
    """Give a master what it has before there is a cluster."""
    etc, spool = node.directory / "etc", node.directory / "spool/cluster/1"
    (etc / "conf.d").mkdir(parents=True)
    (etc / "main.conf").write_text("one")
    (etc / "conf.d/a.conf").write_text("a")
    (etc / "own.pem").write_text("the master's certificate")
    (spool / "spam/0a").mkdir(parents=True)
    for number in range(30):
        (spool / f"spam/0a/{number}").write_text(f"mail {number}" * 100)


def test_configuration_and_spools_are_the_same_everywhere(new_cluster: NewCluster, tmp_path: Path) -> None:
    files = Files(new_cluster, tmp_path, 3)
    master, second = files.cluster.nodes[0], files.cluster.nodes[1]

    eventually(lambda: (files.etc(2) / "conf.d/a.conf").exists() and (files.etc(3) / "conf.d/a.conf").exists())
    assert not (files.etc(2) / "own.pem").exists()
    arrives(files.spool(1, 1), files.spool(2, 1), files.spool(3, 1))
    # A member's own spool, a name that is no text, a deletion, a purge elsewhere.
    mails = files.spool(2, 2) / "spam"
    mails.mkdir(parents=True)
    odd = os.fsencode(mails) + b"/\xff\n\xfe"
    Path(os.fsdecode(odd)).write_text("odd")
    (mails / "plain").write_text("plain")
    arrives(files.spool(2, 2), files.spool(1, 2), files.spool(3, 2))
    (files.spool(3, 2) / "spam/plain").unlink()
    (mails / "later").write_text("later")
    Path(os.fsdecode(odd)).unlink()
    arrives(files.spool(2, 2), files.spool(1, 2))
    eventually(lambda: set(listing(files.spool(3, 2))) == {"spam", "spam/later"})
    # A set of configuration files, with a mode and a deletion; the action is run once on each of the others.
    before = files.actions.read_text().count("\n") if files.actions.exists() else 0
    for number in range(20):
        (files.etc(1) / f"conf.d/{number}.conf").write_text("new")
    (files.etc(1) / "conf.d/a.conf").unlink()
    (files.etc(1) / "main.conf").write_text("two")
    (files.etc(1) / "main.conf").chmod(0o600)
    eventually(lambda: all((files.etc(number) / "main.conf").read_text() == "two" for number in (2, 3)))
    eventually(lambda: not (files.etc(2) / "conf.d/a.conf").exists() and (files.etc(3) / "conf.d/19.conf").exists())
    assert (files.etc(3) / "main.conf").stat().st_mode & 0o777 == 0o600
    eventually(lambda: files.actions.read_text().count("\n") == before + 2)
    ran = eventually(lambda: [each for each in master.node_status(2)["actions"] if "date" in each["run"]])
    assert (ran[0]["error"], ran[0]["run"]) == ("", "sh -c date +%s.%N >> $PMGSYNC_TEST_ACTIONS")
    # A table that changed has its action run on the others, not on the master that wrote it.
    told_of_tables = Path(f"{files.actions}.tables")
    told_of_tables.touch()
    copied = told_of_tables.read_text().count("named")
    master.sql("INSERT INTO named VALUES (1, 'x')")
    eventually(lambda: told_of_tables.read_text().count("named") >= copied + 2)
    # An edit on a slave is put back, kept and told.
    (files.etc(2) / "main.conf").write_text("edited by mistake")
    eventually(lambda: (files.etc(2) / "main.conf").read_text() == "two")
    kept = list(files.etc(2).glob("main.conf.pmgsync-*"))
    assert [path.read_text() for path in kept] == ["edited by mistake"]
    told = eventually(lambda: [a for a in master.node_status(2)["alerts"] if "put back" in a["text"]])
    assert kept[0].name in told[0]["text"]
    shown = trees(master, 3)
    assert shown["/var/spool/gateway/cluster/1"]["files"] == 30
    assert shown["/etc/gateway"]["owner"] == 1
    eventually(lambda: all(tree["behind"] == 0 and not tree["error"] for tree in trees(second, 3).values()))


def large(path: Path, size: int, number: int) -> None:
    """Write a file that holds nothing twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(number).randbytes(size))


@pytest.mark.campaign
def test_whatever_is_killed_the_trees_end_equal(new_cluster: NewCluster, tmp_path: Path) -> None:
    files = Files(new_cluster, tmp_path, 2)
    master, other = files.cluster.nodes
    arrives(files.spool(1, 1), files.spool(2, 1))
    rng = random.Random(7)
    for round_number in range(6):
        for number in range(150):
            path = files.spool(1, 1) / f"spam/{rng.randrange(16):02x}/{round_number}-{number}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(rng.randbytes(rng.randrange(40_000)))
        large(files.spool(1, 1) / f"virus/{round_number}", 24 << 20, round_number)
        victims = [(node, name) for node in (master, other) for name in ("files", "broker")]
        node, name = victims[round_number % len(victims)]
        time.sleep(rng.random() * 0.5)  # where it is hit is left to chance
        if name == "broker":
            node.kill("broker")
            node.start("broker")
        else:
            node.workers()["files"].send_signal(signal.SIGKILL)
    arrives(files.spool(1, 1), files.spool(2, 1), within_s=90)
    stage = files.spool(2, 1) / ".pmgsync/stage"
    eventually(lambda: not list(stage.iterdir()), what="an empty staging area")
    eventually(lambda: trees(master, 2)["/var/spool/gateway/cluster/1"]["behind"] == 0)


@pytest.mark.campaign
def test_a_full_disk_stops_files_and_not_rows(new_cluster: NewCluster, tmp_path: Path) -> None:
    files = Files(new_cluster, tmp_path, 2)
    master, other = files.cluster.nodes
    arrives(files.spool(1, 1), files.spool(2, 1))
    # Another disk under the same name is seen and stops the tree; the marker on it makes it right.
    mounted = files.spool(2, 1)
    content = tmp_path / "content"
    shutil.copytree(mounted, content)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", mounted], check=True)
    try:
        (files.spool(1, 1) / "spam/one").write_text("one")
        stopped = eventually(
            lambda: [t for t in trees(master, 2).values() if "marker" in t["error"]], within_s=90, what="a stopped tree"
        )
        assert "not mounted" in stopped[0]["error"]
        eventually(lambda: master.node_status(2)["state"] == "ERROR")
        shutil.copytree(content, mounted, dirs_exist_ok=True)
        eventually(lambda: not [t for t in trees(master, 2).values() if t["error"]], within_s=60)
        large(files.spool(1, 1) / "spam/large", 20 << 20, 1)
        eventually(lambda: [t for t in trees(master, 2).values() if "no room" in t["error"]])
        master.sql("INSERT INTO t VALUES (1)")
        eventually(lambda: other.content("t") == ["(1)"], what="rows go on")
        subprocess.run(["mount", "-o", "remount,size=64m", mounted], check=True)
        arrives(files.spool(1, 1), files.spool(2, 1), within_s=60)
    finally:
        other.stop()
        subprocess.run(["umount", mounted], check=True)


@pytest.mark.campaign
def test_a_deleted_nodes_spool_stays_and_newcomers_get_it(new_cluster: NewCluster, tmp_path: Path) -> None:
    files = Files(new_cluster, tmp_path, 2)
    cluster = files.cluster
    large(files.spool(2, 2) / "spam/mail", 1 << 20, 1)
    arrives(files.spool(2, 2), files.spool(1, 2))
    cluster.master.pmgcm("delete", "2", "--yes")
    cluster.nodes[1].stop()
    newcomer = cluster.add_node("node3")
    cluster.join(newcomer)
    arrives(files.spool(1, 2), files.spool(3, 2), files.spool(2, 2))
    arrives(files.spool(1, 1), files.spool(3, 1))
    # An emptied configuration is nothing that the others follow at once, and an administrator's word is.
    shutil.rmtree(files.etc(1) / "conf.d")
    (files.etc(1) / "main.conf").unlink()
    shown = eventually(
        lambda: (done := cluster.master.pmgcm("files", check=False)) and "gone at once" in done.stdout and done,
        what="the master stops its tree",
    )
    assert (files.etc(3) / "main.conf").exists()
    assert shown.returncode == 1
    assert cluster.master.node_status(1)["state"] == "ERROR"
    cluster.master.pmgcm("files", "--accept", "/etc/gateway")
    eventually(lambda: "has none of the" in str(trees(newcomer, 3)["/etc/gateway"]["error"]))
    newcomer.pmgcm("files", "--accept", "/etc/gateway")
    eventually(lambda: not (files.etc(3) / "main.conf").exists())
