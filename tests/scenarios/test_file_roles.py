"""Trees of files when roles change: the direction turns, what a master before had is kept, spools stay."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.scenarios.test_files import EXTRA, PROFILE, SCHEMA, Files, arrives, listing, seed, trees

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]

ROLES = """
[[actions]]
role = "master"
run = ["sh", "-c", "echo master >> $PMGSYNC_TEST_ROLES"]

[[actions]]
role = "node"
run = ["sh", "-c", "echo node >> $PMGSYNC_TEST_ROLES"]
"""


def promoted(node: Node) -> bool:
    return not node.pmgcm("promote", "--yes", check=False).returncode


def test_a_promotion_turns_the_configuration(new_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    profile, roles = tmp_path / "files.toml", tmp_path / "roles"
    profile.write_text(PROFILE + ROLES)
    os.environ["PMGSYNC_TEST_ACTIONS"], os.environ["PMGSYNC_TEST_ROLES"] = str(tmp_path / "actions"), str(roles)
    cluster = new_cluster(nodes=3, profile=str(profile), extra=EXTRA, seed=seed, schema=SCHEMA)
    first, second, _ = cluster.nodes
    etc = [node.directory / "etc" for node in cluster.nodes]
    spools = [node.directory / "spool/cluster/1" for node in cluster.nodes]
    own = etc[0] / "own.pem"
    own.unlink()  # each node's own file would make trees differ
    arrives(*etc)
    arrives(*spools)
    eventually(lambda: Counter(roles.read_text().split()) == {"master": 1, "node": 2})

    # The master hands over, and takes over again: nothing is left behind by that.
    for master, where in ((second, etc[1]), (first, etc[0])):
        eventually(partial(promoted, master))
        (where / "main.conf").write_text(f"written on {master.name}")
        arrives(*etc)
    for node in cluster.nodes:
        assert "nothing has diverged" in node.pmgcm("divergence", "list").stdout
    eventually(lambda: Counter(roles.read_text().split()) == {"master": 3, "node": 4})

    # The master dies, and what is written there afterwards nobody else sees.
    first.kill("agent")
    first.kill("broker")
    (etc[0] / "main.conf").write_text("written on the old master")
    (etc[0] / "conf.d/only-here.conf").write_text("only here")
    # The name is free here once the old master's lease is over.
    eventually(partial(promoted, second), within_s=90)
    (etc[1] / "main.conf").write_text("written on the new master")
    (etc[1] / "conf.d/new.conf").write_text("new")
    (etc[1] / "conf.d/a.conf").unlink()
    arrives(etc[1], etc[2])
    eventually(lambda: Counter(roles.read_text().split()) == {"master": 4, "node": 4})

    # It returns, and its files worker is killed while it takes the other side of its tree.
    first.start()
    eventually(lambda: "files" in first.workers())
    first.workers()["files"].send_signal(signal.SIGKILL)
    arrives(*etc)
    eventually(lambda: roles.read_text().split().count("node") == 5)
    shown = json.loads(first.pmgcm("divergence", "list", "--json").stdout)
    paths = {file["path"] for folder in shown["configurations"] for file in folder["files"]}
    assert paths >= {"/etc/gateway/main.conf", "/etc/gateway/conf.d/only-here.conf"}
    kept = {path.read_text() for path in (first.state_dir / "divergence").rglob("*.conf")}
    assert kept >= {"written on the old master", "only here"}
    assert not list(etc[0].rglob("*.pmgsync-*"))
    eventually(lambda: [a for a in second.node_status(1)["alerts"] if "files of a configuration" in a["text"]])
    for folder in shown["configurations"]:
        assert folder["files"][0]["path"] in first.pmgcm("divergence", "show", folder["id"]).stdout
        first.pmgcm("divergence", "drop", folder["id"], "--yes")
    assert "nothing has diverged" in first.pmgcm("divergence", "list").stdout
    # From now on an edit there is one like on every other node.
    (etc[0] / "main.conf").write_text("edited by mistake")
    eventually(lambda: (etc[0] / "main.conf").read_text() == "written on the new master")

    # It is deleted. What the new master has purged of its spool, or never had, stays where it is.
    (spools[0] / "spam/late").write_text("late")
    arrives(*spools)
    for path in (spools[1] / "spam").rglob("[0-9]"):
        path.unlink()
    second.pmgcm("delete", "1", "--yes")
    first.stop()
    name = "/var/spool/gateway/cluster/1"
    eventually(lambda: trees(second, 3)[name]["owner"] == 2 and not trees(second, 3)[name]["behind"])
    (spools[1] / "spam/0a/12").unlink()
    (spools[1] / "spam/from-the-master").write_text("new")
    eventually((spools[2] / "spam/from-the-master").exists)
    assert len([name for name in listing(spools[2]) if name.startswith("spam/0a/")]) == 30


def test_a_switchover_does_not_wait_until_a_spool_is_complete(
    new_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    files = Files(new_cluster, tmp_path, 2)
    first, second = files.cluster.nodes
    (files.etc(1) / "own.pem").unlink()
    arrives(files.etc(1), files.etc(2))
    arrives(files.spool(1, 1), files.spool(2, 1))
    for number in range(20):
        (files.spool(1, 1) / f"spam/large-{number}").write_bytes(b"%d" % number + bytes(20 << 20))
    name = "/var/spool/gateway/cluster/1"
    eventually(lambda: trees(second, 2)[name]["behind"], what="the new master is behind")
    print(second.pmgcm("promote").stdout)
    assert trees(second, 2)[name]["behind"], "the spool was complete already"
    assert not trees(second, 2)[name]["of_master"] and trees(second, 2)["/etc/gateway"]["of_master"]
    # Before an edit both have to have looked at the tree in their new roles: else what was there before is kept beside.
    eventually(lambda: (tree := trees(first, 1)["/etc/gateway"])["owner"] == 2 and not tree["behind"])
    (files.etc(2) / "main.conf").write_text("written on the new master")
    (files.spool(1, 1) / "spam/later").write_text("later")
    arrives(files.etc(1), files.etc(2))
    eventually((files.spool(2, 1) / "spam/later").exists, what="what is new comes first")
    arrives(files.spool(1, 1), files.spool(2, 1), within_s=180)
    assert first.pmgcm("divergence", "list").stdout == "nothing has diverged on this node\n"


def test_a_join_or_create_removes_nothing_of_a_spool(new_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    files = Files(new_cluster, tmp_path, 2)
    cluster = files.cluster
    first, second = cluster.nodes
    mails = files.spool(2, 2) / "spam"
    mails.mkdir(parents=True)
    (mails / "own").write_text("own")
    arrives(files.spool(1, 1), files.spool(2, 1))
    arrives(files.spool(1, 2), files.spool(2, 2))
    first.pmgcm("delete", "2", "--yes")
    first.stop()
    # All but this node is lost, and another one begins a new cluster. It has a spool from elsewhere, too.
    fresh = cluster.add_node("fresh")
    fresh.sql(SCHEMA)
    for number, text in ((1, "new"), (2, "of a node of an older cluster")):
        spam = fresh.directory / f"spool/cluster/{number}/spam"
        spam.mkdir(parents=True)
        (spam / "fresh").write_text(text)
    fresh.start()
    fresh.pmgcm("create")
    line = fresh.pmgcm("join-cmd").stdout.strip().splitlines()[-1].split()
    told = second.pmgcm(*line[line.index("join") :], "--yes").stdout
    assert "none of a spool is removed" in told
    eventually((files.spool(2, 1) / "spam/fresh").exists)
    eventually((fresh.directory / "spool/cluster/2/spam/own").exists)
    eventually(lambda: all(not tree["behind"] for tree in trees(fresh, 2).values()) and trees(fresh, 2))
    assert len([name for name in listing(files.spool(2, 1)) if name.startswith("spam/0a/")]) == 30
    assert (mails / "own").read_text() == "own"
    assert (fresh.directory / "spool/cluster/2/spam/fresh").read_text() == "of a node of an older cluster"
