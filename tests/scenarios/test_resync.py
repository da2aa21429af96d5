"""`pmgcm resync`: copies are fetched anew, by table, by node, or all of them, while everything goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, eventually
from tests.harness.command_line import refused
from tests.harness.schema import BANK_TABLES, STANDARD

pytestmark = pytest.mark.cluster
NewCluster = Callable[..., Cluster]

PROFILE = """
name = "resync"
all_tables = true
[tables.owned]
policy = "owned"
owner = "cid"
"""
SCHEMA = """
CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (id int PRIMARY KEY, v text);
CREATE TABLE owned (cid int, rid int, v text, PRIMARY KEY (cid, rid));
INSERT INTO a SELECT g, 'a' || g FROM generate_series(1, 2000) AS g;
INSERT INTO b SELECT g, 'b' || g FROM generate_series(1, 2000) AS g;
"""
DAMAGE = "SET session_replication_role = replica; DELETE FROM a WHERE id > 7; UPDATE b SET v = 'damaged' WHERE id = 3;"


@pytest.mark.campaign
def test_copies_are_fetched_anew(new_cluster: NewCluster, tmp_path: Path) -> None:
    profile = tmp_path / "resync.toml"
    profile.write_text(PROFILE)
    cluster = new_cluster(nodes=2, profile=str(profile), schema=SCHEMA)
    master, slave = cluster.nodes
    master.sql("INSERT INTO owned VALUES (1, 1, 'of the master')")
    slave.sql("INSERT INTO owned VALUES (2, 1, 'of the slave')")
    cluster.wait()

    slave.sql(DAMAGE)
    done = slave.pmgcm("resync", "--table", "a")
    assert "fetched: 1 table from node 1" in done.stdout
    assert slave.content("a") == master.content("a")
    assert slave.content("b") != master.content("b")

    # All of it; the slave's own rows are nobody else's to bring.
    slave.sql(DAMAGE + "DELETE FROM owned WHERE cid = 1")
    slave.pmgcm("resync", timeout_s=200)
    cluster.assert_equal(["a", "b", "owned"])
    assert len(slave.content("owned")) == 2

    # On the master only what another node owns.
    master.sql("SET session_replication_role = replica; DELETE FROM owned WHERE cid = 2")
    refused(master.pmgcm("resync", check=False), "this node is the master", "pmgcm resync CID")
    refused(master.pmgcm("resync", "--table", "a", check=False), "answers for the whole table a itself")
    refused(master.pmgcm("resync", "1", check=False), "this node answers for its own rows")
    refused(master.pmgcm("resync", "9", check=False), "there is no node 9")
    refused(slave.pmgcm("resync", "--table", "none", check=False), "there is no table none here")
    master.pmgcm("resync", "2")
    assert len(master.content("owned")) == 2


@pytest.mark.campaign
def test_a_chain_that_has_stopped_goes_on_and_who_is_silent_is_named(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    # Rows that stand against the chain: it stops, and goes on when the table was fetched.
    slave.sql("SET session_replication_role = replica; INSERT INTO t VALUES (5000, 'stands in the way')")
    master.sql("INSERT INTO t VALUES (5000, 'right')")
    eventually(lambda: slave.node_status(2)["state"].startswith("ERROR"), what="the chain has not stopped")
    slave.pmgcm("resync", "--table", "public.t")
    cluster.wait()
    cluster.assert_equal(["t", *BANK_TABLES])
    assert json.loads(slave.pmgcm("verify", "--json", "--share", "100").stdout)["same"]

    master.stop()
    eventually(lambda: slave.node_status(1)["heartbeat_age_s"] > 5, what="the master is still heard")
    refused(slave.pmgcm("resync", check=False), "node 1 does not answer")
    # Refused before anything was begun.
    assert slave.sql("SELECT count(*) FROM pmgsync.stale_table WHERE kind <> 'none'") == [(0,)]
