"""The demo that loses its master ends equal, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]


@pytest.mark.parametrize("nodes", [2, 3])
def test_the_demo_with_a_failover_ends_equal(nodes: int, pg_bindir: str) -> None:
    command = [sys.executable, "-m", "cli.main", "demo", "--failover", "--json", "--nodes", str(nodes)]
    done = subprocess.run(
        [*command, "--seconds", "9", "--rate", "10"], check=False, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["equal"] and not summary["differences"]
    failover = summary["failover"]
    assert failover["master"] == "pmg2"
    assert failover["rules_acknowledged"] > 0
    # A transaction may be exported that was committed and not acknowledged any more.
    assert failover["rules_behind"] <= failover["exported"] <= failover["rules_behind"] + 1
