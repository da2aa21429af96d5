"""The README's procedures for lost nodes, followed to the letter: every line of them is run, in their order."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, Node, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]
NewCluster = Callable[..., Cluster]

README = Path(__file__).parents[2] / "README.md"
ASKING = {"delete", "join", "promote", "restore"}
"""A test has no terminal to answer at."""
PROFILE = """
name = "recovery"
all_tables = true
[tables.owned]
policy = "owned"
owner = "cid"
backup = "statistics"
[[files]]
kind = "config"
root = "/etc/gateway"
setting = "config_root"
include = ["main.cf", "conf.d/"]
"""
SCHEMA = """
CREATE TABLE rule (id serial PRIMARY KEY, v text);
CREATE TABLE owned (cid int, rid int, v text, PRIMARY KEY (cid, rid));
"""
TABLES = ("rule", "owned")
FILES = '[files]\nconfig_root = "{directory}/etc"'


def procedure(title: str) -> list[list[str]]:
    """Return the blocks of commands below a heading, each a list of lines."""
    text = README.read_text().split(f"\n### {title}\n", 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
    blocks = [
        [line.strip() for line in paragraph.splitlines()]
        for paragraph in text.split("\n\n")
        if all(line.startswith("    ") for line in paragraph.strip("\n").splitlines())
    ]
    assert all(line.startswith("pmgcm ") for block in blocks for line in block)
    return blocks


def follow(node: Node, block: list[str], files: Path, printed: list[str]) -> list[str]:
    """Run the lines of a block on a node, and return the line that `join-cmd` printed, if it did.

    Args:
        files: stands for /root and /mnt.
        printed: the line that `join-cmd` has printed on the master; it is run where the procedure has an example of it.
    """
    for line in block:
        _, command, *arguments = shlex.split(line)
        if command == "join":
            command, *arguments = printed
        arguments = [argument.replace("/root/", f"{files}/").replace("/mnt/", f"{files}/") for argument in arguments]
        done = node.pmgcm(command, *arguments, *(["--yes"] if command in ASKING else []))
        if command == "join-cmd":
            words = done.stdout.strip().splitlines()[-1].split()
            printed = words[words.index("join") :]
    return printed


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "recovery.toml"
    path.write_text(PROFILE)
    return str(path)


def configured(node: Node) -> None:
    (node.directory / "etc/conf.d").mkdir(parents=True)


def test_one_node_is_lost(new_cluster: NewCluster, profile: str, tmp_path: Path) -> None:
    on_master, on_new = procedure("One node is lost")
    cluster = new_cluster(nodes=3, profile=profile, schema=SCHEMA, extra=FILES, seed=configured)
    master, other, lost = cluster.nodes
    for number, node in enumerate(cluster.nodes, 1):
        node.sql("INSERT INTO owned VALUES (%s, 1, 'written before')", (number,))
    cluster.wait()
    lost.close()
    cluster.nodes.remove(lost)
    master.sql("INSERT INTO rule (v) VALUES ('while it was away')")
    printed = follow(master, on_master, tmp_path, [])
    new = cluster.add_node("again")
    new.start()
    follow(new, on_new, tmp_path, printed)
    cluster.assert_equal(TABLES)
    assert len(new.content("owned")) == 3
    assert [node["cid"] for node in other.status()["nodes"]] == [1, 2, 4]
    new.sql("INSERT INTO owned VALUES (4, 1, 'of the new one')")
    cluster.wait()
    cluster.assert_equal(TABLES)


def test_the_master_is_lost(new_cluster: NewCluster, profile: str, tmp_path: Path) -> None:
    on_heir, on_master, on_new = procedure("The master is lost")
    cluster = new_cluster(nodes=3, profile=profile, schema=SCHEMA, extra=FILES, seed=configured)
    lost, heir, other = cluster.nodes
    (lost.directory / "etc/main.cf").write_text("the configuration")
    lost.sql("INSERT INTO rule (v) VALUES ('one'), ('two')")
    for number, node in enumerate(cluster.nodes, 1):
        node.sql("INSERT INTO owned VALUES (%s, 1, 'written before')", (number,))
    cluster.wait()
    eventually((heir.directory / "etc/main.cf").exists, what="the configuration is on the heir")
    lost.close()
    cluster.nodes.remove(lost)
    follow(heir, on_heir, tmp_path, [])
    heir.sql("INSERT INTO rule (v) VALUES ('of the new master')")
    (heir.directory / "etc/main.cf").write_text("changed by the new master")
    printed = follow(heir, on_master, tmp_path, [])
    new = cluster.add_node("again")
    configured(new)
    new.start()
    follow(new, on_new, tmp_path, printed)
    cluster.assert_equal(TABLES)
    assert heir.content("rule", "v") == ['("of the new master")', "(one)", "(two)"]
    heir.sql("UPDATE owned SET v = 'the new master answers for it' WHERE cid = 1")
    cluster.wait()
    cluster.assert_equal(TABLES)
    for node in (other, new):
        eventually(lambda: (node.directory / "etc/main.cf").read_text() == "changed by the new master")  # noqa: B023


def test_everything_is_lost(new_cluster: NewCluster, profile: str, tmp_path: Path) -> None:
    on_any, on_first, on_others = procedure("Everything is lost")
    (tmp_path / "passphrase").write_text("correct horse\n")
    (tmp_path / "passphrase").chmod(0o600)
    cluster = new_cluster(nodes=2, profile=profile, schema=SCHEMA, extra=FILES, seed=configured)
    master, slave = cluster.nodes
    (master.directory / "etc/main.cf").write_text("the configuration")
    master.sql("INSERT INTO rule (v) VALUES ('one'), ('two')")
    for number, node in enumerate(cluster.nodes, 1):
        node.sql("INSERT INTO owned VALUES (%s, 1, 'written before')", (number,))
    cluster.wait()
    before = {table: master.content(table) for table in TABLES}
    follow(slave, on_any, tmp_path, [])
    master.sql("INSERT INTO rule (v) VALUES ('since the backup')")
    for node in cluster.nodes:
        node.close()

    fresh = Cluster(tmp_path / "fresh", nodes=2, profile=profile, extra=FILES)
    try:
        for node in fresh.nodes:
            node.prepare()
            configured(node)
            node.create_database()
            node.sql(SCHEMA)
            node.start()
        first, second = fresh.nodes
        printed = follow(first, on_first, tmp_path, [])
        follow(second, on_others, tmp_path, printed)
        fresh.assert_equal(TABLES)
        assert {table: second.content(table) for table in TABLES} == before
        assert (second.directory / "etc/main.cf").read_text() == "the configuration"
        # The node that joined answers for no row of the node 2 that was lost, and numbers its own from 1 on.
        assert [node["cid"] for node in first.status()["nodes"]] == [1, 3]
        second.sql("INSERT INTO owned VALUES (3, 1, 'of the new one')")
        first.sql("UPDATE owned SET v = 'the master answers for it' WHERE cid = 2")
        first.sql("INSERT INTO rule (v) VALUES ('three')")
        fresh.wait()
        fresh.assert_equal(TABLES)
    finally:
        fresh.close()
