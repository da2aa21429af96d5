"""A backup's tables are of one instant, and end with the sequences that belong to them."""

from __future__ import annotations

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.profile import Profile
from pmgsync.postgres.copy.backup import take_backup
from tests.harness.database import Database


def test_tables_are_of_one_instant(server: EmbeddedPostgres, mirror: Profile) -> None:
    database = Database(server)
    database.sql(
        "CREATE TABLE public.a (id serial PRIMARY KEY, v int); CREATE TABLE public.b (v int);"
        "CREATE UNLOGGED TABLE public.lost (v int); CREATE SEQUENCE public.free START 5;"
        "INSERT INTO public.a (v) VALUES (1); INSERT INTO public.b VALUES (1)"
    )
    rows: dict[bytes, bytes] = {}
    table, values = b"", []
    for piece, attachment in take_backup(database.dsn, mirror, statistics=False):
        match piece["kind"]:
            case "table":
                if not table:
                    # Behind the snapshot: in none of the tables that are still to be read.
                    database.sql("UPDATE public.a SET v = 2; INSERT INTO public.b VALUES (2)")
                table = piece["table"]
                rows[table] = b""
            case "rows":
                rows[table] += attachment or b""
            case "sequences":
                values = piece["values"]
    assert rows == {b"a": b"1\t1\n", b"b": b"1\n"}
    assert values == [[b"public", b"a_id_seq", 1, True], [b"public", b"free", 5, False]]
