"""What the gateway's own daemons read: cluster.conf follows the cluster document on every node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pmgsync.core.cluster_conf import parse
from tests.harness.cluster import Cluster, eventually

pytestmark = pytest.mark.cluster


@pytest.mark.campaign
def test_cluster_conf_follows_the_members(new_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    path = tmp_path / "conf" / "cluster.conf"
    path.parent.mkdir()
    path.write_text("# the gateway's\n")
    path.chmod(0o640)
    # Nodes of one machine, of which each writes the same.
    cluster = new_cluster(
        nodes=2, extra=f'[files]\ncluster_conf = "{path}"', schema="CREATE TABLE t (id int PRIMARY KEY)"
    )

    def members() -> dict[int, tuple[str, str]]:
        return {
            section.cid: (section.kind, section.values["name"]) for section in parse(path.read_text()) if section.cid
        }

    eventually(lambda: members() == {1: ("master", "node1"), 2: ("node", "node2")}, what="both stand in cluster.conf")
    text = path.read_text()
    assert text.startswith("# the gateway's\n\nmaster: 1\n")
    assert "\tmaxcid 2\n" in text
    assert path.stat().st_mode & 0o777 == 0o640
    # A file that cannot be written is an alert, and is written as soon as it can be.
    path.unlink()
    path.mkdir()
    cluster.master.pmgcm("delete", "2", "--yes")
    alerts = eventually(
        lambda: [alert for alert in cluster.master.node_status(1)["alerts"] if alert["kind"] == "cluster.conf"],
        what="an alert",
    )
    assert f"{path} cannot be written (Is a directory)" in alerts[0]["text"]
    path.rmdir()
    eventually(lambda: path.is_file() and members() == {1: ("master", "node1")}, what="it is written after all")
    eventually(
        lambda: not [alert for alert in cluster.master.node_status(1)["alerts"] if alert["kind"] == "cluster.conf"],
        what="the alert goes",
    )
