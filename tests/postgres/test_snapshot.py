"""Snapshots and restores on real servers: exact vectors, raw bytes, tables that change meanwhile, interruptions."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.positions import LAST
from pmgsync.core.profile import Profile
from pmgsync.errors import PmgsyncError
from pmgsync.postgres.catalog import Table
from pmgsync.postgres.copy import take as snapshot_module
from pmgsync.postgres.copy.take import Piece, take_chain_snapshot, take_database_snapshot
from tests.harness.cluster import eventually
from tests.harness.database import Database

OURS = "FROM pg_stat_activity WHERE application_name LIKE '%sync snapshot'"


def rows_of(pieces: Iterator[Piece], table: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return a table's rows as COPY text, and the result."""
    data, current, result = b"", b"", {}
    for piece, attachment in pieces:
        current = piece.get("table", current)
        if piece["kind"] == "rows" and current == table:
            data += attachment or b""
        if piece["kind"] == "result":
            result = piece
    return data, result


# -- exactness ---------------------------------------------------------------------------------------------------------


def committed(database: Database) -> dict[int, int]:
    """Return the commit LSN of each marker, from the chain's own slot."""
    found, lsn = {}, 0
    for (data,) in database.sql(
        "SELECT data FROM pg_logical_slot_peek_binary_changes('pmgsync', NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'pmgsync')"
    ):
        message = bytes(data)
        if message[:1] == b"B":
            (lsn,) = struct.unpack_from(">Q", message, 1)
        elif message[:1] == b"I":
            # I, relation, N, number of columns, t, length, text
            (length,) = struct.unpack_from(">I", message, 9)
            found[int(message[13 : 13 + length])] = lsn
    return found


def test_the_vector_says_exactly_what_is_in(server: EmbeddedPostgres, mirror: Profile) -> None:
    app = Database(server)
    app.sql("CREATE TABLE public.mark (id int PRIMARY KEY)")
    made = app.provision(mirror)
    stop = threading.Event()

    def write(first: int) -> None:
        with app.connection() as connection, connection.cursor() as cursor:
            for number in range(first, first + 1_000_000):
                # Overlapping transactions: the order of commit is not that of the numbers.
                cursor.execute(f"BEGIN; INSERT INTO public.mark VALUES ({number}); COMMIT")
                if stop.is_set():
                    return

    writers = [threading.Thread(target=write, args=(number * 1_000_000,)) for number in range(4)]
    for writer in writers:
        writer.start()
    snapshots = []
    try:
        for _ in range(6):
            snapshots.append(rows_of(take_database_snapshot(app.dsn, mirror, own=(1, made.incarnation)), b"mark"))
            eventually(lambda: app.sql("SELECT count(*) FROM public.mark")[0][0] > 0)
            chain = take_chain_snapshot(
                app.dsn, mirror, origin=1, own=(1, made.incarnation), master=1, members=(1,)
            )  # fmt: skip
            snapshots.append(rows_of(chain, b"mark"))
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    commits = committed(app)
    assert len(commits) == app.sql("SELECT count(*) FROM public.mark")[0][0]
    for data, result in snapshots:
        incarnation, lsn, part = result["vector"][1]
        assert (incarnation, part) == (made.incarnation, LAST)
        assert {int(line) for line in data.split()} == {number for number, at in commits.items() if at <= lsn}
    assert 0 < len(snapshots[0][0].split()) < len(commits)


def test_positions_of_others_are_those_of_the_snapshot(server: EmbeddedPostgres, mirror: Profile) -> None:
    app = Database(server)
    app.sql("CREATE TABLE public.t (id int PRIMARY KEY)")
    made = app.provision(mirror)
    app.sql("INSERT INTO pmgsync.position (origin, incarnation, lsn) VALUES (2, 9, '0/20'), (3, 8, '0/30')")
    _, result = rows_of(take_database_snapshot(app.dsn, mirror, own=(1, made.incarnation)), b"t")
    assert result["vector"].keys() == {1, 2, 3}
    assert result["vector"][3] == [8, 0x30, LAST]
    chain = take_chain_snapshot(app.dsn, mirror, origin=3, own=(1, made.incarnation), master=3, members=(1, 3))
    _, result = rows_of(chain, b"t")
    assert result["vector"] == {3: [8, 0x30, LAST]}
    with pytest.raises(PmgsyncError, match="nothing of the chain of node 4"):
        list(take_chain_snapshot(app.dsn, mirror, origin=4, own=(1, 1), master=1, members=(1, 4)))


def test_a_table_that_was_truncated_is_not_taken_for_empty(
    server: EmbeddedPostgres, mirror: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Database(server)
    app.sql("CREATE TABLE public.t (id int PRIMARY KEY); INSERT INTO public.t SELECT generate_series(1, 10)")
    made = app.provision(mirror)
    real: Any = vars(snapshot_module)["hold_tables"]
    calls: list[int] = []

    def hold(connection: Any, dsn: str, tables: list[Table]) -> Iterator[str]:
        calls.append(1)
        statements = {
            1: "TRUNCATE public.t; INSERT INTO public.t VALUES (11)",
            2: "ALTER TABLE public.t ALTER id TYPE bigint",
            3: "ALTER TABLE public.t RENAME TO u; CREATE TABLE public.t AS SELECT * FROM public.u",
        }
        if len(calls) in statements:
            app.sql(statements[len(calls)])
        yield from real(connection, dsn, tables)

    monkeypatch.setattr(snapshot_module, "hold_tables", hold)
    data, result = rows_of(take_database_snapshot(app.dsn, mirror, own=(1, made.incarnation)), b"t")
    assert data == b"11\n"
    assert result["rows"] == 2
    assert len(calls) == 4


def test_a_snapshot_can_be_given_up_at_any_time(server: EmbeddedPostgres, mirror: Profile) -> None:
    app = Database(server)
    app.sql(
        "CREATE TABLE public.t (v text); INSERT INTO public.t SELECT repeat('x', 1000) FROM generate_series(1, 30000)"
    )
    made = app.provision(mirror)

    def gone() -> bool:
        return app.sql(f"SELECT count(*) {OURS}") == [(0,)] and app.left()[0] == 1

    with app.connection() as holder:
        holder.cursor().execute("BEGIN; INSERT INTO public.t VALUES ('open')")
        with closing(take_database_snapshot(app.dsn, mirror, own=(1, made.incarnation))) as pieces:  # type: ignore[type-var]
            piece, _ = next(pieces)
            assert piece["kind"] == "wait"
            assert f"process {holder.info.backend_pid}" in piece["for"]
        eventually(gone)
    with closing(take_database_snapshot(app.dsn, mirror, own=(1, made.incarnation))) as pieces:  # type: ignore[type-var]
        for piece, _ in pieces:
            if piece["kind"] == "rows":
                break
    eventually(gone)
