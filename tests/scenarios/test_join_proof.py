"""Joining without a fingerprint, with the root password, and again after an interruption, as a person does it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pmgsync.core.members import format_fingerprint
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.pam import PAM, SECRET, Make
from tests.harness.schema import STANDARD

NewCluster = Callable[..., Cluster]
needs_pam = pytest.mark.skipif(
    os.geteuid() != 0 or not PAM.is_dir(), reason="a PAM service can be made by root only, on a machine with PAM"
)
pytestmark = pytest.mark.cluster


def at_a_terminal(node: Node, *arguments: str, answers: list[str]) -> tuple[int, str]:
    """Run pmgcm with a terminal, type an answer at each question, return the exit code and what it wrote."""
    ours, theirs = pty.openpty()
    written: list[bytes] = []
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "--config", str(node.config), *arguments],
            stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        left = list(answers)
        # What is typed ahead is thrown away when a password is asked for: each answer waits for its question.
        while piece := process.stdout.read(4096):
            written.append(piece)
            if left and b"".join(written).endswith(b": "):
                os.write(ours, f"{left.pop(0)}\n".encode())
        process.stdout.close()
        return process.wait(60), b"".join(written).decode()
    finally:
        os.close(ours)
        os.close(theirs)


@needs_pam
def test_joining_with_nothing_but_the_masters_address_and_root_password(
    new_cluster: NewCluster, make_service: Make, tmp_path: Path
) -> None:
    cluster: Cluster = new_cluster(nodes=1, schema=STANDARD, extra=f'[join]\npam_service = "{make_service(":")}"')
    master = cluster.master
    newcomer = cluster.add_node("newcomer")
    newcomer.start()
    ports = ("--port", str(master.join), "--key-port", str(master.key))
    told = master.pmgcm("join-cmd", "--json").stdout

    code, written = at_a_terminal(newcomer, "join", "127.0.0.1", *ports, answers=["no"])
    assert code == 1
    assert "nothing was changed" in written
    fingerprint = next(line.strip() for line in written.splitlines() if line.count(":") == 31)
    assert fingerprint in told, "it is the one that the master shows"

    done = newcomer.pmgcm("join", "127.0.0.1", *ports, "--yes", check=False)
    assert done.returncode == 1
    assert "--fingerprint" in done.stderr, "nobody is trusted unseen"

    code, written = at_a_terminal(newcomer, "join", "127.0.0.1", *ports, answers=["yes", "wrong", "yes"])
    assert code == 1
    assert "does not accept this token or password" in written
    code, written = at_a_terminal(newcomer, "join", "127.0.0.1", *ports, answers=["yes", SECRET, "yes"])
    assert code == 0, written
    cluster.wait()
    cluster.assert_equal(["t"])
    logs = "".join(node.log(service) for node in cluster.nodes for service in ("broker", "agent"))
    for seen in (written, logs):
        assert SECRET not in seen


@pytest.mark.campaign
@needs_pam
def test_a_script_joins_with_a_password_file(new_cluster: NewCluster, make_service: Make, tmp_path: Path) -> None:
    cluster: Cluster = new_cluster(nodes=1, schema=STANDARD, extra=f'[join]\npam_service = "{make_service(":")}"')
    newcomer = cluster.add_node("newcomer")
    newcomer.start()
    secret = tmp_path / "password"
    secret.write_text(SECRET + "\n")
    line = cluster.join_arguments()
    token = line.index("--token")
    newcomer.pmgcm(*line[:token], "--password-file", str(secret), *line[token + 2 :])
    cluster.wait()
    cluster.assert_equal(["t"])


@pytest.mark.campaign
def test_a_join_that_is_killed_goes_by_itself_and_the_same_line_ends_well(new_cluster: NewCluster) -> None:
    cluster: Cluster = new_cluster(
        nodes=1, schema=STANDARD, seed=lambda node: node.sql(
            "CREATE TABLE big (id int PRIMARY KEY, v text); "
            "INSERT INTO big SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 200000) AS i"
        ),
    )  # fmt: skip
    master = cluster.master
    newcomer = cluster.add_node("newcomer")
    newcomer.start()
    line = cluster.join_arguments()
    command = [sys.executable, "-m", "cli.main", "--config", str(newcomer.config), *line]
    joining = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = eventually(lambda: _joining(master), within_s=30, what="the newcomer is joining")
    joining.kill()
    joining.wait()
    assert found["state"] == "S"
    assert "ERROR" not in master.pmgcm("status", check=False).stdout
    # It may also be left to go by itself, after half a minute; whoever is in a hurry says the line again.
    newcomer.pmgcm(*line)
    cluster.wait()
    cluster.assert_equal(["t", "big"])
    assert [node["joining"] for node in master.status()["nodes"]] == [None, None]


@pytest.mark.campaign  # half a minute of real time; the rule itself is in tests/pure
def test_a_joining_node_that_is_not_heard_again_is_forgotten(new_cluster: NewCluster) -> None:
    cluster: Cluster = new_cluster(nodes=1, schema=STANDARD)
    newcomer = cluster.add_node("newcomer")
    newcomer.start()
    command = [sys.executable, "-m", "cli.main", "--config", str(newcomer.config), *cluster.join_arguments()]
    joining = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: _joining(cluster.master), within_s=30, what="the newcomer is joining")
    finally:
        joining.kill()
        joining.wait()
    if "no cluster defined" in newcomer.pmgcm("status", check=False).stderr:
        eventually(lambda: len(cluster.master.status()["nodes"]) == 1, within_s=60, what="it goes by itself")


def _joining(master: Node) -> dict[str, object] | None:
    return next((node for node in master.status()["nodes"] if node["joining"] is not None), None)


def test_a_fingerprint_in_any_form_is_taken() -> None:
    from pmgsync.core.members import parse_fingerprint

    key = bytes(range(32))
    for text in (format_fingerprint(key), key.hex(), key.hex().upper(), f" {key.hex(':')} "):
        assert parse_fingerprint(text) == key
