"""The exceptions of pmgsync: one root, which says what was wrong, what to do, and whether it heals by itself."""

from __future__ import annotations

from collections.abc import Sequence


class PmgsyncError(Exception):
    """Something pmgsync could not do, told in a sentence.

    Args:
        message: what was wrong and where, one sentence without a final full stop.
        hint: what the administrator can do about it, or "" when there is nothing to do but wait.

    Attributes:
        code: the error's name on the wire (PROTOCOL.md, section 9); a class that has none of its own travels under its
            parent's, and arrives as that.
        recoverable: True when repeating the same thing later may succeed without anyone's help.
    """

    code: str = "failed"
    recoverable: bool = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message


class ConfigError(PmgsyncError):
    """A configuration file or profile says something that cannot be used; names file, key and what was expected."""


class ProtocolError(PmgsyncError):
    """Bytes from a peer, a journal or a WAL stream are not what PROTOCOL.md allows."""

    code = "bad_request"


class UnknownOperationError(ProtocolError):
    """A message's `op` is not known here; a later version may know it."""

    code = "unknown_op"


class UnknownChainError(PmgsyncError):
    """A chain, or that incarnation of it, is not held here."""

    code = "unknown_chain"


class FrameDamagedError(ProtocolError):
    """A frame's checksum does not match its bytes."""


class DamagedFileError(PmgsyncError):
    """A backup is not whole, or something of it was changed."""


class PassphraseError(PmgsyncError):
    """A backup is encrypted under another passphrase."""


class MembershipError(PmgsyncError):
    """A membership operation is not allowed, or its proof (token, fingerprint, signature) does not hold."""

    code = "refused"


class SplitBrainError(MembershipError):
    """Two nodes are master of the cluster at once, because a promotion was forced; an administrator has to decide."""


class TokenRefusedError(MembershipError):
    """A join token or password is not accepted; why, stands in the master's log only."""

    code = "bad_token"


class TooManyAttemptsError(TokenRefusedError):
    """Too many wrong tokens or passwords were tried; none is looked at for a while."""

    code = "too_many_attempts"


class PreflightError(PmgsyncError):
    """A check before a change found something that must be put right first; nothing was changed."""


class UnreachableError(PmgsyncError):
    """A peer, a broker or a server does not answer; it may come back."""

    code = "unavailable"
    recoverable = True


class JournalError(PmgsyncError):
    """The journal cannot be written or read now (disk full, failed fsync)."""

    recoverable = True


class JournalDamagedError(PmgsyncError):
    """A journal's content does not match its checksums, or has a hole in the middle."""


class ChainBrokenError(PmgsyncError):
    """A chain cannot be continued from where it ended; its incarnation is over (slot lost, database restored)."""


class ResyncRequiredError(PmgsyncError):
    """A position cannot be reached by replay any more; a snapshot must be taken.

    Args:
        tables: schema and name of the tables that are to be fetched; none: all that the origin answers for.
    """

    code = "resync_required"

    def __init__(self, message: str, *, hint: str = "", tables: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message, hint=hint)
        self.tables = tables


class ApplyError(PmgsyncError):
    """A transaction could not be applied; carries everything an administrator needs to find it.

    Args:
        message: what the server said.
        table: schema-qualified name, "" when no table is involved.
        lsn: the origin's commit LSN as text, for example "0/15D4F68".
        sqlstate: five characters, "" when the error is not PostgreSQL's.
    """

    def __init__(self, message: str, *, hint: str = "", table: str = "", lsn: str = "", sqlstate: str = "") -> None:
        super().__init__(message, hint=hint)
        self.table = table
        self.lsn = lsn
        self.sqlstate = sqlstate


class UnknownEpochError(PmgsyncError):
    """A transaction is of an epoch whose cluster document has not come here yet; it waits, and all that follow it."""

    recoverable = True


class AwaitedError(PmgsyncError):
    """A transaction waits for something else that happens on this node, and all that follow it on its chain with it."""

    recoverable = True


class TransientApplyError(ApplyError):
    """Applying failed for a reason that passes (deadlock, shutdown, lost connection)."""

    recoverable = True
