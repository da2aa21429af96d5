"""The server's setting `synchronous_standby_names`: set when it is empty, taken back when it is ours."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import psycopg2
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.errors import PmgsyncError
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.standby_names import OURS, Names, StandbyNames, forget_names, read_names


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("", Names.NONE),
        (" ", Names.NONE),
        (OURS, Names.OURS),
        ('ANY 2 (standby1, "pmgsync capture")', Names.BY_HAND),
        ('"PMGSYNC capture"', Names.BY_HAND),
        ("*", Names.BY_HAND),
        ("FIRST 2 (a, *)", Names.BY_HAND),
        ("ANY 1 (*)", Names.BY_HAND),
        ("standby1", Names.OTHERS),
        ('FIRST 1 ("a*b")', Names.OTHERS),
        ("pmgsync", Names.OTHERS),
    ],
)
def test_whose_a_setting_is(setting: str, names: Names) -> None:
    assert read_names(setting) is names


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """A server of its own, for its settings are changed."""
    made = EmbeddedPostgres()
    made.start()
    yield made
    made.close()


@pytest.fixture
def session(server: EmbeddedPostgres) -> Iterator[StandbyNames]:
    made = StandbyNames(server.dsn())
    yield made
    if made.now() is Names.OURS:
        made.take_back()
    made.close()


class Client(threading.Thread):
    """Commits once; `told` says what it was told."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        super().__init__(daemon=True)
        self._dsn = server.dsn()
        self._told: list[str] = []
        self.start()

    def told(self) -> str:
        """Return what it was told, "" while it waits."""
        return "".join(self._told)

    def run(self) -> None:
        try:
            with (
                contextlib.closing(psycopg2.connect(self._dsn)) as connection,
                connection,
                connection.cursor() as cursor,
            ):
                cursor.execute(f"CREATE TABLE waited_{id(self)} (id int)")
            self._told.append("done")
        except psycopg2.Error as error:
            self._told.append(str(error))


def put_and_prove(session: StandbyNames) -> None:
    """Set it, and wait until commits wait."""
    session.put()
    deadline = time.monotonic() + 20
    while not session.commits_wait():
        assert time.monotonic() < deadline, "no commit waits"


def waiting_client(server: EmbeddedPostgres) -> Client:
    """Return a client whose commit waits; it is the first one since that was proved."""
    client = Client(server)
    deadline = time.monotonic() + 20
    with contextlib.closing(connect(server.dsn(), application_name="test")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            while time.monotonic() < deadline:
                cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
                if cursor.fetchone() == (1,):
                    return client
                assert not client.told(), "a commit did not wait"
                time.sleep(0.02)
    raise AssertionError("no commit waits")


def test_commits_wait_from_the_proof_on_and_not_from_the_setting_on(
    server: EmbeddedPostgres, session: StandbyNames
) -> None:
    """Sessions see the setting before the checkpointer has it take effect; here that one is held up."""
    with contextlib.closing(connect(server.dsn(), application_name="test")) as own, own, own.cursor() as cursor:
        cursor.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")
        row = cursor.fetchone()
    assert row is not None
    checkpointer = psutil.Process(int(row[0]))
    checkpointer.send_signal(signal.SIGSTOP)
    try:
        session.put()
        assert session.now() is Names.OURS
        client = Client(server)
        client.join(20)
        assert client.told() == "done", "this is what the proof is for"
        assert not session.commits_wait()
    finally:
        checkpointer.send_signal(signal.SIGCONT)
    put_and_prove(session)
    waiting_client(server)
    assert session.commits_wait(), "it waits for nobody else"


def test_commits_wait_while_it_stands_and_return_when_it_is_taken_back(
    server: EmbeddedPostgres, session: StandbyNames
) -> None:
    assert not session.commits_wait()
    put_and_prove(session)
    assert session.now() is Names.OURS
    client = waiting_client(server)
    # None of pmgsync's own sessions does.
    with contextlib.closing(connect(server.dsn(), application_name="test")) as own, own, own.cursor() as cursor:
        cursor.execute("CREATE TABLE public.own (id int); DROP TABLE public.own")
    assert not client.told()
    session.take_back()
    client.join(20)
    assert client.told() == "done"
    assert session.now() is Names.NONE


def test_a_client_whose_wait_is_ended_is_not_told_that_it_is_done(
    server: EmbeddedPostgres, session: StandbyNames
) -> None:
    put_and_prove(session)
    client = waiting_client(server)
    assert session.break_waits() == 1
    client.join(20)
    assert "server closed the connection" in client.told()
    assert forget_names(server.dsn())
    assert not forget_names(server.dsn())


def test_what_the_server_does_not_take_is_an_error(server: EmbeddedPostgres, session: StandbyNames) -> None:
    configuration = server.data_dir / "postgresql.conf"
    text = configuration.read_text()
    # What stands last counts, and the file of ALTER SYSTEM is read after this one; a damaged one stops the reload.
    configuration.write_text(text + "\nno_such_setting_at_all = = 1\n")
    try:
        with pytest.raises(PmgsyncError, match="does not take a change of synchronous_standby_names"):
            session.put()
    finally:
        configuration.write_text(text)
    session.put()
    assert session.now() is Names.OURS
