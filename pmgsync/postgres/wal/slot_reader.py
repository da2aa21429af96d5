"""Reads one slot's pgoutput messages and confirms what is safe."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg2
from psycopg2.extras import LogicalReplicationConnection

from pmgsync.core.positions import format_lsn, parse_lsn
from pmgsync.errors import ChainBrokenError, PmgsyncError, UnreachableError
from pmgsync.postgres.names import CAPTURE
from pmgsync.postgres.session import PINNED, connect

STATUS_INTERVAL_S = 86_400
"""Seconds between feedback that psycopg2 sends by itself while it reads: in effect never, see `SlotReader.confirm`."""
READ_BYTES = 64 << 10
"""Bytes of messages between two looks at anything else."""
PATIENCE_S = 20.0
"""Seconds for which feedback is held back while a transaction is on its way to the disk: the server waits for 60."""

_BEGIN, _EMITTED = ord("B"), ord("M")


@dataclass(frozen=True, slots=True)
class SlotState:
    """What the server says of a slot and of itself; LSNs as integers."""

    system_id: str
    timeline: int
    current_lsn: int
    plugin: str | None
    wal_status: str | None
    confirmed_lsn: int
    restart_lsn: int
    active_pid: int | None

    @property
    def exists(self) -> bool:
        """True when there is a slot of that name in this database."""
        return self.plugin is not None

    @property
    def retained_bytes(self) -> int:
        """Bytes of WAL that the server keeps because of the slot."""
        return max(0, self.current_lsn - self.restart_lsn) if self.restart_lsn else 0


_SLOT_STATE = """
SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system())::text,
       (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()),
       pg_catalog.pg_current_wal_insert_lsn()::text,
       s.plugin::text, s.wal_status, s.confirmed_flush_lsn::text, s.restart_lsn::text, s.active_pid
FROM (SELECT 1) AS one
LEFT JOIN pg_catalog.pg_replication_slots AS s
       ON s.slot_name = %s AND s.slot_type = 'logical' AND s.database = pg_catalog.current_database()
"""


def read_slot_state(connection: psycopg2.extensions.connection, slot: str) -> SlotState:
    """Return the state of a slot.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    with connection.cursor() as cursor:
        cursor.execute(_SLOT_STATE, (slot,))
        row = cursor.fetchone()
        assert row is not None
    text: list[Any] = [value.decode() if isinstance(value, bytes) else value for value in row]
    return SlotState(
        text[0], text[1], parse_lsn(text[2]), text[3], text[4],
        parse_lsn(text[5]) if text[5] else 0, parse_lsn(text[6]) if text[6] else 0, text[7],
    )  # fmt: skip


def prove_continuity(state: SlotState, *, system_id: str, timeline: int, journal_lsn: int, whole_lsn: int) -> None:
    """Check that a slot continues exactly what the journal holds. Pure.

    Args:
        system_id, timeline: the server's when the chain began.
        journal_lsn: commit LSN of the newest complete transaction in the journal.
        whole_lsn: the LSN up to which the journal is known to hold everything; the slot was never confirmed beyond it.

    Raises:
        ChainBrokenError: when a hole cannot be ruled out. PostgreSQL would forward a start position that is older than
            the slot's, and a slot made anew simply begins later: both are silent loss unless compared here.
    """
    hint = "nothing need be done: a new chain is begun and the other nodes resynchronise"
    if state.system_id != system_id:
        raise ChainBrokenError(
            f"the database is on another PostgreSQL server than before (system identifier {state.system_id}, "
            f"was {system_id})",
            hint=hint,
        )
    if state.timeline != timeline:
        raise ChainBrokenError(
            f"the server is on timeline {state.timeline}, was on {timeline}: it was restored, or a standby took over",
            hint=hint,
        )
    if not state.exists:
        raise ChainBrokenError("the replication slot is gone", hint=hint)
    if state.plugin != "pgoutput":
        raise ChainBrokenError(f"the replication slot uses the plugin {state.plugin}, not pgoutput", hint=hint)
    if state.wal_status == "lost":
        raise ChainBrokenError("the server has removed WAL that the replication slot needed", hint=hint)
    newest = max(journal_lsn, whole_lsn)
    if state.current_lsn < newest:
        raise ChainBrokenError(
            f"the server's WAL ends at {format_lsn(state.current_lsn)}, before {format_lsn(newest)}, which was read "
            "from it earlier: older data was restored",
            hint=hint,
        )
    if state.confirmed_lsn > newest + 1:
        raise ChainBrokenError(
            f"the replication slot begins at {format_lsn(state.confirmed_lsn)}, the journal ends at "
            f"{format_lsn(newest)}: the slot was made anew, or the journal was lost",
            hint=hint,
        )


class SlotReader:
    """A replication connection that streams one slot. `messages` never blocks.

    Attributes:
        taken: how many messages were read.
        drained: no more was there when `messages` ended.
    """

    def __init__(self, dsn: str, *, slot: str, publication: str, start_lsn: int) -> None:
        """Start streaming what was committed at or after `start_lsn`.

        Raises:
            UnreachableError: when the server cannot be reached, or the slot is in use.
        """
        options = " ".join(f"-c {name}={value}" for name, value in PINNED.items() if name != "client_encoding")
        parameters = psycopg2.extensions.parse_dsn(dsn)
        parameters["options"] = f"{parameters.get('options', '')} {options} -c wal_sender_timeout=60s".strip()
        parameters |= {"client_encoding": PINNED["client_encoding"], "application_name": CAPTURE}
        try:
            self._connection = psycopg2.connect(**parameters, connection_factory=LogicalReplicationConnection)
        except psycopg2.OperationalError as error:
            raise UnreachableError(f"PostgreSQL does not answer ({_first_line(error)})") from error
        try:
            self._cursor = self._connection.cursor()
            self._newest_start = self._commit = self._told = self._moved = self.taken = 0
            self.drained = False
            self._told_at = time.monotonic()
            arguments = {"proto_version": "1", "publication_names": f'"{publication}"', "messages": "true"}
            if self._connection.server_version >= 160000:
                # Before 16 the Origin message tells an applied transaction from a local one.
                arguments["origin"] = "none"
            self._cursor.start_replication(
                slot_name=slot,
                start_lsn=start_lsn,
                options=arguments,
                decode=False,
                status_interval=STATUS_INTERVAL_S,
            )
            self._poll = select.poll()
            self._poll.register(self._connection.fileno(), select.POLLIN)
        except psycopg2.Error as error:
            self.close()
            if error.pgcode == "55006":
                raise UnreachableError(
                    f"the replication slot {slot} is in use by another process ({_first_line(error)})",
                    hint="another pmgsync-agent runs on this database, or the server has not noticed yet that an "
                    "earlier one ended; it is tried again",
                ) from error
            raise UnreachableError(f"the replication slot {slot} cannot be read ({_first_line(error)})") from error

    def fileno(self) -> int:
        """Return the connection's descriptor; readable means that `messages` may yield something."""
        return int(self._connection.fileno())

    def wait(self, timeout_ms: int) -> bool:
        """Wait until something may be there; False when time is over."""
        return bool(self._poll.poll(timeout_ms))

    @property
    def caught_up_lsn(self) -> int:
        """The LSN below which the server has sent everything, as of the newest message or keepalive that was read."""
        return int(self._cursor.wal_end)

    def messages(self, most: int = READ_BYTES) -> Iterator[bytes]:
        """Yield the messages that are there, at most about so many bytes; each is taken when it is asked for.

        Raises:
            UnreachableError: when the connection is lost.
        """
        read, size, taken = self._cursor.read_message, 0, 0
        self.drained = False
        try:
            while size < most:
                try:
                    message = read()
                except psycopg2.Error as error:
                    raise UnreachableError(f"the replication connection was lost ({_first_line(error)})") from error
                moves = self._told >= self._newest_start
                if message is None:
                    if moves:
                        self._moved = max(self._moved, self.caught_up_lsn)
                    self.drained = True
                    return
                payload: bytes = message.payload
                start: int = message.data_start
                if payload[0] == _BEGIN:
                    self._commit = int.from_bytes(payload[1:9], "big")
                if moves:
                    # Keepalives before it are not shown; they were not beyond this transaction's commit, or this
                    # message.
                    self._moved = max(self._moved, self._commit, start if payload[0] == _EMITTED else 0)
                self._newest_start = start
                taken += 1
                size += len(payload)
                yield payload
        finally:
            self.taken += taken

    @property
    def confirmed(self) -> int:
        """The newest LSN that was confirmed."""
        return self._told

    def confirm(self, lsn: int, *, ask: bool = False, commits_wait: bool = False) -> None:
        """Tell the server that everything below an LSN is on disk here, and optionally ask how far it has come.

        Nothing is sent when more would be confirmed than that. Once the newest message was confirmed, psycopg2 moves
        what it confirms to the LSN of every keepalive it reads. That LSN is not in the journal yet, and a broker that
        is killed at that moment would find its slot beyond its journal: a break that never was. So nothing is sent
        until the watermark of what was read is on disk, and the server is asked only then. psycopg2 says the
        keepalive's LSN with whatever is confirmed next, also when messages have come since; for that reason feedback is
        held back for `PATIENCE_S` only.

        In synchronous mode the server lets commits return up to that LSN. Then the newest message is confirmed at once,
        without waiting for the watermark of what was read behind it, whose keepalives psycopg2 has passed over by then.
        Whatever psycopg2 adds to a confirmation is the LSN of a keepalive after the newest message, and only when that
        message was confirmed: no commit that a slave lacks lies below.

        Args:
            commits_wait: for this.

        Raises:
            UnreachableError: when the connection is lost.
        """
        if lsn >= self._newest_start and self.caught_up_lsn > lsn and not commits_wait:
            return
        if self._moved > lsn and time.monotonic() - self._told_at < PATIENCE_S:
            return
        try:
            self._cursor.send_feedback(write_lsn=lsn, flush_lsn=lsn, apply_lsn=lsn, reply=ask, force=True)
        except psycopg2.Error as error:
            raise UnreachableError(f"the replication connection was lost ({_first_line(error)})") from error
        self._told, self._told_at = max(self._told, lsn), time.monotonic()

    def close(self) -> None:
        """End the connection; the slot is free as soon as the server has noticed."""
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()


def emit_barrier(dsn: str) -> int:
    """Write a message to the WAL and return its LSN: whatever was committed before the call lies below.

    Raises:
        UnreachableError: when the server does not answer.
    """
    try:
        connection = connect(dsn, application_name="pmgsync barrier")
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute("SELECT pg_catalog.pg_logical_emit_message(true, 'pmgsync', 'barrier')::text")
                row = cursor.fetchone()
                assert row is not None
                text = row[0]
        finally:
            connection.close()
    except (psycopg2.Error, PmgsyncError) as error:
        raise UnreachableError(f"PostgreSQL does not answer ({_first_line(error)})") from error
    return parse_lsn(text.decode() if isinstance(text, bytes) else text)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
