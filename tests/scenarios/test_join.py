"""Joining: a refusal is a sentence and changes nothing; a join that was interrupted can be repeated."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import psycopg2
import pytest

from broker.cluster.joiners import SILENCE_S
from broker.cluster.state_directory import StateDirectory
from pmgsync.core.membership import Member
from pmgsync.postgres.pg_dump import installed_pg_dumps
from pmgsync.postgres.programs import BINDIR_VARIABLE, find_binaries
from tests.harness.cluster import Cluster, Node, eventually, free_ports
from tests.harness.health import alerts
from tests.harness.schema import STANDARD

pytestmark = pytest.mark.cluster
NewCluster = Callable[..., Cluster]
BIG = """
CREATE TABLE big (id int PRIMARY KEY, v text);
INSERT INTO big SELECT g, repeat(md5(g::text), 20) FROM generate_series(1, 60000) AS g;
"""


def replaced(arguments: list[str], option: str, value: str) -> list[str]:
    """Return arguments with another value of an option."""
    where = arguments.index(option)
    return [*arguments[: where + 1], value, *arguments[where + 2 :]]


def untouched(node: Node) -> bool:
    """True when a newcomer's database is as it was and no cluster is defined there."""
    databases = {row[0] for row in node.sql("SELECT datname FROM pg_database WHERE datname LIKE 'app%'")}
    return (
        node.sql("SELECT v FROM mine") == [("precious",)]
        and databases <= {"app", "app_pmgsync_new"}
        and "no cluster defined" in node.pmgcm("status", check=False).stderr
    )


def test_refusals_change_nothing(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=1, schema=STANDARD)
    newcomer = cluster.add_node("newcomer")
    newcomer.sql("CREATE TABLE mine (v text); INSERT INTO mine VALUES ('precious')")
    newcomer.start("broker")
    good = cluster.join_arguments()
    wrong_key = ":".join(["AB"] * 32)
    for arguments, sentence in (
        (replaced(good, "--fingerprint", wrong_key), "does not match"),
        (replaced(good, "--fingerprint", "xyz"), "is not a fingerprint"),
        (replaced(good, "--token", "A" * 26), "does not accept this token"),
        (replaced(good, "--port", str(free_ports(1)[0])), "unreachable"),
    ):
        done = newcomer.pmgcm(*arguments, check=False)
        assert done.returncode == 1, arguments
        assert sentence in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert untouched(newcomer)
    newcomer.name = "node1"
    newcomer.write_config()
    done = newcomer.pmgcm(*good, check=False)
    assert done.returncode == 1
    assert "a member is called node1 already" in done.stderr
    assert "will join" not in done.stderr, "it is said before anybody is asked"
    assert untouched(newcomer)
    newcomer.name = "newcomer"
    newcomer.write_config()
    newcomer.pmgcm(*good)
    # It is a slave from the first moment on; its agent has not even run.
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        newcomer.sql("INSERT INTO t VALUES (1, 'mine')")
    newcomer.start("agent")
    again = newcomer.pmgcm(*cluster.join_arguments(), check=False)
    assert again.returncode == 1
    assert "cluster already defined" in again.stderr
    third = cluster.add_node("third")
    third.start()
    used = third.pmgcm(*good, check=False)
    assert used.returncode == 1
    assert "does not accept this token" in used.stderr
    cluster.nodes.remove(third)
    third.close()
    assert newcomer.pmgcm("create", check=False).returncode == 1
    cluster.wait()
    cluster.assert_equal(["t"])


@pytest.mark.parametrize("after_s", [1.2, pytest.param(2.2, marks=pytest.mark.campaign)])
def test_a_join_that_is_killed_can_be_repeated(new_cluster: NewCluster, after_s: float) -> None:
    cluster = new_cluster(nodes=1, schema=BIG)
    newcomer = cluster.add_node("newcomer")
    newcomer.sql("CREATE TABLE mine (v text); INSERT INTO mine VALUES ('precious')")
    newcomer.start()
    command = [sys.executable, "-m", "cli.main", "--config", str(newcomer.config), *cluster.join_arguments()]
    joining = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy())
    time.sleep(after_s)
    joining.kill()
    joining.wait()
    mine, big = newcomer.sql("SELECT to_regclass('mine')::text, to_regclass('big')::text")[0]
    assert (mine is None) != (big is None), "neither the old database nor the new one"
    if mine is not None:
        assert newcomer.sql("SELECT v FROM mine") == [("precious",)]
    if "no cluster defined" in newcomer.pmgcm("status", check=False).stderr:
        eventually(
            lambda: newcomer.pmgcm(*cluster.join_arguments(), check=False).returncode == 0, what="the second try"
        )
    cluster.wait()
    cluster.assert_equal(["big"], "count(*), sum(id), min(v), max(v)")
    assert [node["cid"] for node in cluster.master.status()["nodes"]] == [1, 2], "one node, one CID"


@pytest.mark.campaign
@pytest.mark.parametrize("away_s", [1.0, 40.0])
def test_the_same_line_ends_well_after_the_master_was_killed(new_cluster: NewCluster, away_s: float) -> None:
    cluster = new_cluster(nodes=1, schema=BIG)
    master = cluster.master
    newcomer = cluster.add_node("newcomer")
    newcomer.start()
    line = cluster.join_arguments()
    command = [sys.executable, "-m", "cli.main", "--config", str(newcomer.config), *line]
    joining = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    eventually(lambda: len(master.status()["nodes"]) == 2, within_s=30, what="the newcomer is joining")
    for service in ("broker", "agent"):
        master.kill(service)
    time.sleep(away_s)
    master.start()
    said, _ = joining.communicate(timeout=200)
    assert "Traceback" not in said
    if joining.returncode:
        if away_s > SILENCE_S:
            eventually(lambda: len(master.status()["nodes"]) == 1, within_s=SILENCE_S + 30, what="it is given up")
        newcomer.pmgcm(*line)
    cluster.wait()
    cluster.assert_equal(["big"], "count(*), sum(id), min(v), max(v)")
    assert len(master.status()["nodes"]) == 2, "half a member stays"
    for node in cluster.nodes:
        assert node.sql("SELECT count(*)::int FROM pg_replication_slots") == [(1,)]
        chains = {path.name.partition("-")[0] for path in (node.state_dir / "journal").glob("*.db")}
        assert chains == {str(one["cid"]) for one in master.status()["nodes"]}
        assert node.sql("SELECT datname::text FROM pg_database WHERE datname LIKE 'app%'") == [("app",)]


@pytest.mark.campaign
def test_what_is_going_to_be_lost_is_said_in_numbers_before_it_is(new_cluster: NewCluster) -> None:
    schema = resources.files("cli.demo").joinpath("pmg_schema.sql").read_text()
    options = {"profile": "pmg", "dbname": "ruledb", "encoding": "SQL_ASCII"}
    cluster = new_cluster(nodes=1, schema=schema, extra='[subscription]\nlevel = "premium"', **options)
    newcomer = cluster.add_node("newcomer")
    newcomer.extra = '[subscription]\nlevel = "basic"\ndiffering = "refuse"'
    newcomer.write_config()
    newcomer.sql(schema)
    newcomer.sql(
        "INSERT INTO cstatistic (cid, rid, time, bytes, direction, spamlevel, ptime, sender) "
        "SELECT 0, g, 1262347200 + g, 1, true, 0, 1, 'x' FROM generate_series(0, 1233) AS g; "
        "INSERT INTO creceivers VALUES (0, 1, 'x', false); ALTER TABLE userprefs ADD COLUMN extra int"
    )
    newcomer.start()
    arguments = [word for word in cluster.join_arguments() if word != "--yes"]
    with contextlib.closing(psycopg2.connect(newcomer.server.dsn("ruledb", application_name="pmg-filter"))):
        refused = newcomer.pmgcm(*arguments, check=False)
        assert refused.returncode == 1
        assert "the subscription level of this node is 'basic', the cluster's is 'premium'" in refused.stderr
        newcomer.extra = '[subscription]\nlevel = "basic"'
        newcomer.write_config()
        done = newcomer.pmgcm(*arguments, check=False)
    assert done.returncode == 1, "nobody said yes"
    for line in (
        "What this node has of its own is in no copy, and will be GONE:",
        "  cstatistic: 1,234 rows, the oldest of 2010-01-01",
        "  creceivers: 1 row\n",
        "these sessions will be ended: pmg-filter (1).",
        "Free where the server keeps its data:",
        "Clocks: the master's and this node's differ by less than",
        "Tables: this node's are not the same as the master's.",
        "Subscription: the subscription level of this node is 'basic'",
    ):
        assert line in done.stderr, done.stderr
    assert newcomer.sql("SELECT count(*) FROM cstatistic") == [(1234,)]
    newcomer.pmgcm(*arguments, "--yes")
    assert newcomer.sql("SELECT count(*) FROM cstatistic") == [(0,)]
    levels = {member.cid: member.level for member in held_members(newcomer)}
    assert levels == {1: "premium", 2: "basic"}
    text = "its subscription level is 'basic', the master's is 'premium'"
    for node in cluster.nodes:
        eventually(partial(shows, node, text), what="status shows the difference")


def shows(node: Node, text: str) -> bool:
    return text in alerts(node, 2)


def held_members(node: Node) -> Sequence[Member]:
    """Return the members in the document that a node holds."""
    signed = StateDirectory(node.directory / "state").document()
    assert signed is not None
    return signed.document.members


def test_a_master_that_can_give_no_snapshot_says_so_before_anybody_joins(
    new_cluster: NewCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = new_cluster(nodes=1, schema="CREATE TABLE t (id int PRIMARY KEY)")
    bindir = tmp_path / "bin"
    bindir.mkdir()
    for program in find_binaries().iterdir():
        if program.name != "pg_dump":
            (bindir / program.name).symlink_to(program)
    master = cluster.master
    # Programs without pg_dump come first, and no directory with another one is on the path.
    monkeypatch.setenv(BINDIR_VARIABLE, str(bindir))
    monkeypatch.setenv("PATH", str(tmp_path))
    if any(major >= master.server.version for major in installed_pg_dumps()):
        pytest.skip("a pg_dump of this server's version is installed on this machine")
    master.kill("agent", signal.SIGTERM)
    master.start("agent")
    monkeypatch.undo()
    newcomer = cluster.add_node("newcomer")
    newcomer.sql("CREATE TABLE mine (v text); INSERT INTO mine VALUES ('precious')")
    newcomer.start()
    arguments = cluster.join_arguments()
    done = eventually(
        lambda: (done := newcomer.pmgcm(*arguments, check=False)) and "agent" not in done.stderr and done,
        what="the master's agent serves",
    )
    assert done.returncode == 1
    assert "the master cannot give a snapshot: no pg_dump of PostgreSQL" in done.stderr
    assert "hint: install postgresql-client-" in done.stderr
    assert untouched(newcomer)
    assert [node["cid"] for node in master.status()["nodes"]] == [1], "nobody was let in"
    master.kill("agent", signal.SIGTERM)
    master.start("agent")
    eventually(lambda: newcomer.pmgcm(*arguments, check=False).returncode == 0, what="the same token lets it in")


@pytest.mark.campaign
def test_a_deleted_node_is_out_at_once_and_may_come_back(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    cluster.wait()
    assert slave.pmgcm("delete", "1", "--yes", check=False).returncode == 1
    assert "unable to delete master node" in master.pmgcm("delete", "1", "--yes", check=False).stderr
    master.pmgcm("delete", "2", "--yes")
    eventually(
        lambda: "no cluster defined" in slave.pmgcm("status", check=False).stderr, what="it knows that it is out"
    )
    master.sql("INSERT INTO t VALUES (1)")
    slave.pmgcm(*cluster.join_arguments())
    cluster.wait()
    cluster.assert_equal(["t"])
    assert [node["cid"] for node in master.status()["nodes"]] == [1, 3], "a CID is never used twice"
