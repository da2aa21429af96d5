"""Fixtures: which PostgreSQL the tests run on, servers and clusters of real processes, all ended within a bound."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.postgres.programs import BINDIR_VARIABLE
from tests.harness.cluster import Cluster

EMBEDDED = "embedded"

# A busy machine is slow: time says nothing about a property.
settings.register_profile("pmgsync", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pmgsync")


def _installed_bindir() -> str | None:
    """Return the server programs of an installed PostgreSQL, None when there are none."""
    if shutil.which("pg_config") is None:
        return None
    found = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=False).stdout.strip()
    return found if found and (Path(found) / "initdb").exists() else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what needs a server on the embedded PostgreSQL and on the installed one, or on the one that is asked for."""
    if "pg_bindir" in metafunc.fixturenames:
        chosen = os.environ.get(BINDIR_VARIABLE)
        values = [chosen] if chosen else [EMBEDDED, *filter(None, [_installed_bindir()])]
        names = ["embedded" if value == EMBEDDED else Path(value).parent.name for value in values]
        metafunc.parametrize("pg_bindir", values, ids=[f"pg-{name}" for name in names], indirect=True, scope="session")


@pytest.fixture(scope="session")
def pg_bindir(request: pytest.FixtureRequest) -> Iterator[str]:
    """The PostgreSQL that this test runs on; child processes find it in the environment."""
    value: str = request.param
    before = os.environ.get(BINDIR_VARIABLE)
    if value != EMBEDDED:
        os.environ[BINDIR_VARIABLE] = value
    try:
        yield value
    finally:
        os.environ.pop(BINDIR_VARIABLE, None)
        if before is not None:
            os.environ[BINDIR_VARIABLE] = before


@pytest.fixture
def server(pg_bindir: str) -> Iterator[EmbeddedPostgres]:
    """One running server."""
    with EmbeddedPostgres() as running:
        yield running


@pytest.fixture
def new_cluster(pg_bindir: str, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Make clusters of real services; `new_cluster(nodes=2, profile="mirror")`."""
    made: list[Cluster] = []

    def make(**options: object) -> Cluster:
        cluster = Cluster(tmp_path / f"cluster{len(made)}", **options)  # type: ignore[arg-type]
        made.append(cluster)
        cluster.start()
        return cluster

    try:
        yield make
    finally:
        for cluster in made:
            cluster.close()
