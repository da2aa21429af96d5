"""Keys that change under load: nothing is lost, whoever was away or was killed follows, and no secret is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmgsync.core.members import Member
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.epochs import cid_of, held
from tests.harness.health import NewCluster, wait_healthy
from tests.harness.ledger import SCHEMA, Ledger, balance, write_profile
from tests.harness.secrets import ProcessList, secret_keys, written

pytestmark = pytest.mark.cluster


def own(node: Node) -> Member:
    member = held(node).document.member(cid_of(node))
    assert member is not None
    return member


def changed(node: Node, *, killed_after_s: float | None = None) -> None:
    """Change a node's keys; perhaps its broker is killed meanwhile, and the command given again when it failed."""
    before = own(node).curve_key
    command = [sys.executable, "-m", "cli.main", "--config", str(node.config), "update-fingerprints"]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if killed_after_s is not None:
        time.sleep(killed_after_s)
        node.kill("broker")
        node.start("broker")
    said, _ = asking.communicate(timeout=120)
    assert "Traceback" not in said
    if asking.returncode:
        assert killed_after_s is not None, said
        node.pmgcm("update-fingerprints")
    assert own(node).curve_key != before


def together(cluster: Cluster) -> None:
    """Wait until all nodes hold one document and are in step."""
    eventually(lambda: len({held(node).body for node in cluster.nodes}) == 1, what="all hold one document")
    wait_healthy(cluster)


@pytest.mark.campaign
def test_every_node_changes_its_keys_while_all_write(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(nodes=3, schema=SCHEMA, profile=write_profile(tmp_path))
    master, slave, third = cluster.nodes
    eventually(lambda: len(held(master).document.voters) == 3, what="three are members")
    secrets = set().union(*map(secret_keys, cluster.nodes))
    with ProcessList() as listed, Ledger(cluster, pause_s=0.05) as ledger:
        changed(slave)
        changed(master)
        together(cluster)
        secrets |= set().union(*map(secret_keys, cluster.nodes))
        # Away while both others change theirs; the master's twice, killed in the middle.
        third.kill("broker")
        third.kill("agent")
        changed(master, killed_after_s=0.3)
        changed(slave, killed_after_s=0.4)
        changed(master)
        third.start()
        together(cluster)
        changed(third, killed_after_s=0.5)
        together(cluster)
        secrets |= set().union(*map(secret_keys, cluster.nodes))
        fourth = cluster.add_node("fourth")
        cluster.nodes.remove(fourth)
        fourth.start()
        line = cluster.join_arguments()
        token = line[line.index("--token") + 1].encode()
        fourth.pmgcm(*line)
    cluster.wait()
    account = balance(cluster, ledger, set())
    print(account)
    assert account.acknowledged
    assert account.lost == ()
    secrets |= secret_keys(fourth) | {token}
    assert not list(listed.shown(secrets, within=tmp_path)), "a secret is in the list of processes"
    everywhere = [found for node in (*cluster.nodes, fourth) for found in written(node, secrets)]
    assert not everywhere
    fourth.close()
