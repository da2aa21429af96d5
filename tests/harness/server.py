"""Two databases of one real server: what is done in the first goes through a real slot and is applied to the second."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from importlib.resources import files

from psycopg2.extensions import connection as Connection  # noqa: N812

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.document import Epoch
from pmgsync.core.emitted import SealKey
from pmgsync.core.frames import Frame
from pmgsync.core.framing import ChainName, Framer
from pmgsync.core.positions import LAST, Position
from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.postgres.apply import Applier
from pmgsync.postgres.session import connect, quote_ident, quote_literal, rows
from pmgsync.postgres.setup import watch

ORIGIN, INCARNATION = 1, 77
_numbers = itertools.count(1)


def make_profile(*tables: TableRule, all_tables: bool = True, ddl: bool = False) -> Profile:
    """Return a profile with these rules; every other table is mirrored."""
    return Profile("test", tables, all_tables, True, ddl, (), (), (), (), "0" * 64)


def rule(name: str, policy: Policy, **options: object) -> TableRule:
    """Return the rule of a table of schema public."""
    return TableRule("public", name, policy, **options)  # type: ignore[arg-type]


class Pair:
    """A source database with a slot, a target database with pmgsync's tables, and the appliers between them."""

    def __init__(self, server: EmbeddedPostgres, profile: Profile, *, options: str = "", origin: int = ORIGIN) -> None:
        number = next(_numbers)
        self.server, self.profile, self.origin = server, profile, origin
        self.master, self.members = ORIGIN, {ORIGIN, 2, 3}
        self.history: tuple[Epoch, ...] = ()
        self.elsewhere = 0
        self.held = ""
        self.epoch = 1
        self.names = (f"source{number}", f"target{number}")
        self.slot = f"slot{number}"
        self.attempt = 1
        self._open: list[Applier] = []
        with contextlib.closing(connect(server.dsn(), application_name="test")) as admin:
            admin.autocommit = True
            for name in self.names:
                admin.cursor().execute(f"CREATE DATABASE {name} {options}")
        self.source, self.target = (self._connect(name) for name in self.names)
        self.key = SealKey(b"", b"")
        self.framer = self._framer(Position(0, LAST))

    def _connect(self, name: str) -> Connection:
        connection = connect(self.server.dsn(name), application_name="test")
        connection.autocommit = True
        return connection

    def _framer(self, position: Position, frame_bytes: int = 1 << 16) -> Framer:
        chain = ChainName(b"c" * 16, self.epoch, self.origin, INCARNATION, self.attempt)
        return Framer(chain, position, key=self.key, frame_bytes=frame_bytes, gap_s=0)

    def _watch(self) -> None:
        for side in (self.source, self.target):
            self.run("CREATE PUBLICATION pmgsync", on=side)
            for name in ("schema.sql", "apply.sql"):
                self.run((files("pmgsync") / "postgres/sql" / name).read_text(), on=side)
            watch.install(side, self.profile)
            watch.arm(side)
        ((inner, outer),) = self.run("SELECT inner_key, outer_key FROM pmgsync.seal_key")
        self.key = SealKey(bytes(inner), bytes(outer))  # type: ignore[call-overload]
        self.framer = self._framer(Position(0, LAST))

    def again(self, position: Position, *, frame_bytes: int = 1 << 16) -> None:
        """Let the frames be made as by a capture that was started anew."""
        self.attempt += 1
        self.framer = self._framer(position, frame_bytes)

    def setup(self, schema: str, *, target: str | None = None, watched: bool = False) -> None:
        """Make the tables on both sides, then publication, slot and position; `watched` as provisioning does it."""
        self.run(schema)
        self.run(schema if target is None else target, on=self.target)
        if watched:
            self._watch()
        else:
            self.run("CREATE PUBLICATION pmgsync FOR ALL TABLES")
        self.run(f"SELECT pg_create_logical_replication_slot('{self.slot}', 'pgoutput')")
        self.run((files("pmgsync") / "postgres/sql/apply.sql").read_text(), on=self.target)
        with self.applier() as applier:
            applier.begin_chain(INCARNATION, Position(0, LAST))

    def run(self, sql: str | bytes, *, on: Connection | None = None) -> list[tuple[object, ...]]:
        """Execute statements on the source, or another database; each by itself unless they say BEGIN."""
        with (on or self.source).cursor() as cursor:
            cursor.execute("SET search_path = public")
            cursor.execute(sql if isinstance(sql, bytes) else sql.encode())
            return cursor.fetchall() if cursor.description else []

    def messages(self) -> list[bytes]:
        """Take what the slot has."""
        found = self.run(
            f"SELECT data FROM pg_logical_slot_get_binary_changes('{self.slot}', NULL, NULL, "
            "'proto_version', '1', 'publication_names', 'pmgsync', 'messages', 'true')"
        )
        return [bytes(row[0]) for row in found]  # type: ignore[call-overload]

    def frames(self, messages: Sequence[bytes] | None = None) -> list[Frame]:
        """Take what the slot has, as frames."""
        made = list(self.framer.feed(messages or self.messages()))
        last = self.framer.flush(0)
        return [*made, last] if last is not None else made

    @contextlib.contextmanager
    def applier(self) -> Iterator[Applier]:
        """A connected applier."""
        applier = Applier(
            self.server.dsn(self.names[1]), self.profile, origin=self.origin, own_cid=99,
            history=lambda: self.history or (Epoch(1, self.master),), members=lambda: self.members,
            elsewhere=lambda: self.elsewhere, holds=lambda: self.held,
        )  # fmt: skip
        try:
            applier.connect()
            yield applier
        finally:
            applier.close()

    def end_appliers(self) -> int:
        """End this origin's sessions on the server's side; returns how many, when they are gone."""
        mine = f"application_name = 'pmgsync apply {self.origin}'"
        ended = self.run(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {mine}")
        return sum(gone is True for (gone,) in ended)

    def apply(self, frames: Sequence[Frame] | None = None) -> Applier:
        """Apply what the slot has, all at once."""
        with self.applier() as applier:
            applier.apply(self.frames() if frames is None else frames)
            return applier

    def table(self, name: str, *, on: Connection | None = None, columns: str = "") -> list[tuple[bytes | None, ...]]:
        """Return a table's rows as text, sorted as bytes."""
        what = f"format('%s', ROW({columns}))" if columns else "format('%s', t)"
        with (on or self.source).cursor() as cursor:
            cursor.execute("SET search_path = public")
            cursor.execute(f'SELECT {what} COLLATE "C" AS row FROM {name} AS t ORDER BY 1')
            return rows(cursor)

    def assert_equal(self) -> None:
        """Every table of the source is the same on the target."""
        found = self.run(
            "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p') AND n.nspname NOT LIKE 'pg\\_%' "
            "AND n.nspname NOT IN ('information_schema', 'pmgsync')"
        )
        for (name,) in found:
            text = name.decode() if isinstance(name, bytes) else str(name)
            assert self.table(text) == self.table(text, on=self.target), text

    def both(self, script: str) -> Applier:
        """Run a script on the source, apply it, and compare."""
        self.run(script)
        applier = self.apply()
        self.assert_equal()
        return applier

    def close(self) -> None:
        """Drop the slot and both databases."""
        self.source.close()
        self.target.close()
        with contextlib.closing(connect(self.server.dsn(), application_name="test")) as admin:
            admin.autocommit = True
            here = f"IN {self.names}"
            # A session that a test has just closed may still be about to end, and have a slot in use.
            admin.cursor().execute(
                f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname {here}"
            )
            admin.cursor().execute(
                f"SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database {here}"
            )
            for name in self.names:
                admin.cursor().execute(b"DROP DATABASE " + quote_ident(name.encode()) + b" WITH (FORCE)")


__all__ = ["INCARNATION", "ORIGIN", "Pair", "make_profile", "quote_literal", "rule"]
