"""Fixtures that several files of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.cluster import free_ports
from tests.harness.command_line import Node


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """Return a node whose database does not exist."""
    made = Node(tmp_path, tmp_path / "node.toml", free_ports(3))
    events, control, join = made.ports
    made.config.write_text(
        f'[node]\nname = "pmg1"\naddress = "127.0.0.1"\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n'
        f'[ports]\nevents = {events}\ncontrol = {control}\njoin = {join}\n[postgres]\ndsn = "host={tmp_path} port=1"\n'
    )
    return made
