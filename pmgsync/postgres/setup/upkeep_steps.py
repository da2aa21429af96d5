"""The steps of keeping a node's database in order: sequences, guard, watch. One session, each step done when called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg2
import psycopg2.errors

from pmgsync.core.ceilings import Ceilings
from pmgsync.core.membership import Member
from pmgsync.core.profile import Profile
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.guard import in_use, keep_guard, old_snapshots
from pmgsync.postgres.setup.lease import note_reign, passed_reign
from pmgsync.postgres.setup.sequence_values import pass_rows, publish_sequences
from pmgsync.postgres.setup.watch import arm, armed, left_out, maintain


class StepFailedError(PmgsyncError):
    """A step could not be done, but the session works; the step is to be tried again later."""

    recoverable = True


class UpkeepSession:
    """A session for the upkeep of a node's database. For one thread.

    Every step raises StepFailedError when it is to be tried again, UnreachableError when the session is lost.
    """

    def __init__(self, dsn: str, profile: Profile) -> None:
        """Open the session.

        Raises:
            UnreachableError: when the server does not let it in.
        """
        self._profile = profile
        self._connection = connect(dsn, application_name="pmgsync upkeep")
        self._connection.autocommit = True

    def close(self) -> None:
        """End the session."""
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()

    def publish_sequences(self, ceilings: Ceilings) -> None:
        """Write what the other nodes need to know of this node's sequences into the stream."""
        with _errors():
            publish_sequences(self._connection, self._profile, ceilings)

    def begin_reign(self, epoch: int) -> list[str]:
        """Set the sequences past every value that is used, and note that this was done for an epoch, if it was not;
        return the names of those that had to be moved.
        """
        with _errors(), self._connection.cursor() as cursor:
            if passed_reign(cursor) >= epoch:
                return []
            moved = pass_rows(self._connection, self._profile)
            note_reign(cursor, epoch)
            return moved

    def keep_guard(self, master: Member | None, *, fenced: bool = False, settle: bool = False, reign: int = 0) -> None:
        """Guard the tables that the master writes, or, when `master` is None, open them: this node is the master.

        Args:
            fenced: this node is the master, and its lease decides.
            settle: nobody who began before that may go on writing unseen.
            reign: the epoch in which this node became master; before its sequences were passed for it nothing opens.
        """
        with _errors():
            if reign:
                with self._connection.cursor() as cursor:
                    if passed_reign(cursor) < reign:
                        raise StepFailedError(
                            f"the tables stay closed until the sequences are passed for epoch {reign}",
                            hint="this node's agent does it by itself",
                        )
            pending = keep_guard(self._connection, self._profile, master=master, fenced=fenced)
            old = old_snapshots(self._connection) if settle else 0
        if pending:
            error = in_use(pending)
            raise StepFailedError(error.message, hint=error.hint)
        if old:
            raise StepFailedError(
                f"{old} transactions that began before the fence was put up may still write past it",
                hint="it is looked at again; end transactions that are open for long",
            )

    def keep_publication(self) -> None:
        """See that the event triggers are there, and make good what they could not do."""
        with _errors():
            if not armed(self._connection):
                arm(self._connection)
            maintain(self._connection)
            tables = left_out(self._connection)
        if tables:
            raise StepFailedError(
                f"changes of {', '.join(tables)} do not travel: PostgreSQL cannot publish a table that has a virtual "
                "generated column and no usable key",
                hint="give it a primary key",
            )


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except psycopg2.errors.LockNotAvailable as error:
        raise StepFailedError("a table or the publication is in use and cannot be brought into order yet") from error
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise UnreachableError(f"the database did not answer ({_line(error)})") from error
    except psycopg2.Error as error:
        raise StepFailedError(_line(error)) from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
