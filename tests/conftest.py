"""Fixtures: which PostgreSQL the tests run on, servers and clusters of real processes, all ended within a bound."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.postgres.programs import BINDIR_VARIABLE
from tests.harness import session as run
from tests.harness.cluster import Cluster
from tests.harness.network import Network, network
from tests.harness.pam import Make, pam_services
from tests.harness.servers import SharedServers

# A busy machine is slow: time says nothing about a property.
settings.register_profile("pmgsync", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pmgsync")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-version", action="store_true", help="run each test on every PostgreSQL that is there")


def pytest_configure() -> None:
    run.begin()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves processes, files or shared memory behind."""
    if hasattr(session.config, "workerinput"):
        return
    for sentence in run.end():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.get_terminal_writer().line(f"LEFT BEHIND: {sentence}", red=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Say which PostgreSQL a test runs on.

    Half of them run here and half of them there, unless one is marked `every_version`: the server's version matters to
    it. `--every-version` runs each on every one.
    """
    if "pg_bindir" not in metafunc.fixturenames:
        return
    versions = run.versions()
    every = metafunc.definition.get_closest_marker("every_version")
    if not every and not metafunc.config.getoption("--every-version"):
        versions = [versions[zlib.crc32(metafunc.definition.nodeid.encode()) % len(versions)]]
    names = [f"pg-{version.name}" for version in versions]
    metafunc.parametrize("pg_bindir", [v.bindir for v in versions], ids=names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def pg_bindir(request: pytest.FixtureRequest) -> Iterator[str]:
    """The PostgreSQL that this test runs on; child processes find it in the environment."""
    value: str = request.param
    before = os.environ[BINDIR_VARIABLE]
    os.environ[BINDIR_VARIABLE] = value
    yield value
    os.environ[BINDIR_VARIABLE] = before


@pytest.fixture(scope="session")
def shared_servers() -> Iterator[SharedServers]:
    """The servers that the tests of this process share."""
    servers = SharedServers()
    yield servers
    servers.close()


@pytest.fixture
def server(pg_bindir: str, shared_servers: SharedServers) -> Iterator[EmbeddedPostgres]:
    """One running server without databases; what a test makes in it is removed behind it."""
    shared = shared_servers.get()
    yield shared.server
    shared.clean()


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


@pytest.fixture
def new_network() -> Iterator[Callable[[int], Network]]:
    """Make networks of namespaces; `new_network(3)` is for three nodes."""
    with contextlib.ExitStack() as stack:
        yield lambda count: stack.enter_context(network(count))


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Make]:
    """Make PAM services that know one password; the argument is shell that runs before it is looked at."""
    with pam_services(tmp_path) as make:
        yield make
