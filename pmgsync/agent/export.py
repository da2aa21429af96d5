"""The export of a stretch: reads its frames from the journal and writes the changes that do not count to a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pmgsync.core.changes import expanded, transactions
from pmgsync.core.divergence import MastersRows, change_line, diverged_changes, first_line, last_line
from pmgsync.core.document import ClusterDocument
from pmgsync.core.forks import Standing, judge
from pmgsync.core.frames import Frame, read_frames, unpack_body
from pmgsync.core.positions import Position, format_lsn
from pmgsync.core.profile import Profile
from pmgsync.core.stretches import Stretch, TableName
from pmgsync.divergence_files import DivergenceFiles, Draft
from pmgsync.errors import ResyncRequiredError, UnknownChainError, UnreachableError
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message, error_from

log = logging.getLogger(__name__)

CREDIT_BYTES = 4 << 20
SILENCE_S = 10.0
STEP_S = 0.5

Other = Callable[[Message, Sequence[bytes]], None]


@dataclass(frozen=True, slots=True)
class Held:
    """What the journal has of a chain.

    Attributes:
        incarnation: 0 when it has none.
        first, head: LSNs; everything after the one up to the other.
        whole: LSN up to which nothing is missing though there may be no frame: the head, or the own chain's watermark.
        since: LSN after which nothing is missing though there may be no frame; at or before `first`.
    """

    incarnation: int = 0
    first: int = 0
    head: int = 0
    whole: int = 0
    since: int = 0


def held_of(link: BrokerLink, origin: int) -> Held:
    """Return what the journal has of a chain."""
    try:
        answer, _ = link.request({"op": "chain.held", "origin": origin})
    except UnknownChainError:
        return Held()
    return Held(*(int(answer[name]) for name in ("incarnation", "first", "head", "whole", "since")))


class Export:
    """One run over a stretch whose end is known; a run that was interrupted is begun anew."""

    def __init__(
        self, link: BrokerLink, files: DivergenceFiles, profile: Profile, document: ClusterDocument, *, other: Other
    ) -> None:
        """Begin.

        Args:
            document: by whose history a transaction counts, or not.
            other: takes messages that are no part of the replay; what it raises ends the run.
        """
        self._link = link
        self._files = files
        self._profile = profile
        self._document = document
        self._other = other

    def run(self, stretch: Stretch, held: Held) -> tuple[list[TableName], bool]:
        """Write the file, if there is anything to write.

        Returns:
            Schema and name of the tables that were touched, and True when the journal did not have all of it.

        Raises:
            UnreachableError: when the broker does not answer.
            ConfigError: when the file cannot be written.
        """
        assert stretch.upto is not None
        here = held.incarnation == stretch.incarnation
        lost = not here or held.since > stretch.after or held.whole < stretch.upto
        missing = self._missing(stretch, held) if lost else ""
        rows = MastersRows(self._profile, stretch.origin, self._document.cids)
        tables: dict[TableName, None] = {}
        with self._files.exporting(stretch) as draft:
            draft.write(
                first_line(
                    stretch.what,
                    cluster=self._document.cluster,
                    node=stretch.node,
                    epoch=stretch.epoch,
                    missing=missing,
                )
            )
            count = 0
            if here:
                after = Position(max(stretch.after, held.first))
                for done in self._diverged(stretch, after, rows, draft):
                    tables[done] = None
                count = draft.lines - 1
            draft.write(last_line(count))
            if (count or lost) and not stretch.gained:
                draft.keep()
        log.warning("action=exported stretch=%s changes=%d tables=%d lost=%s", stretch.id, count, len(tables), lost)
        return list(tables), lost

    def _missing(self, stretch: Stretch, held: Held) -> str:
        if held.incarnation != stretch.incarnation:
            return "the journal has nothing of this life of the chain any more: what it brought is not known"
        parts = []
        if held.since > stretch.after:
            parts.append(f"up to {format_lsn(held.since)}")
        if stretch.upto is not None and held.whole < stretch.upto:
            parts.append(f"after {format_lsn(held.whole)}")
        return f"the journal no longer has what the chain brought {' and '.join(parts)}"

    def _diverged(self, stretch: Stretch, after: Position, rows: MastersRows, draft: Draft) -> Iterator[TableName]:
        """Write the changes, and yield the tables that they touch."""
        assert stretch.upto is not None
        place, half = draft.place(), 0
        for frame in self._frames(stretch, after):
            if not frame.prev.complete or not frame.here.complete:
                if frame.prev.complete:
                    if half == frame.here.lsn:
                        draft.back_to(place)  # the large transaction is begun again
                    place, half = draft.place(), frame.here.lsn
            else:
                half = 0
            for piece in transactions(unpack_body(frame.body)):
                lsn = piece.commit.commit_lsn if piece.commit is not None else frame.here.lsn
                if not stretch.after < lsn <= stretch.upto or self._counts(frame, lsn) is not stretch.gained:
                    continue
                time = piece.commit.commit_time_us if piece.commit is not None else frame.header.commit_time
                for change in diverged_changes(expanded(piece.changes), lsn, time, rows):
                    draft.write(change_line(change))
                    if change.table:
                        yield change.schema, change.table

    def _counts(self, frame: Frame, lsn: int) -> bool:
        header, history = frame.header, self._document.history
        verdict = judge(
            history,
            origin=header.origin,
            # The newest known: a mark that is not known here yet says no more.
            epoch=min(header.epoch, history[-1].epoch),
            incarnation=header.incarnation,
            lsn=lsn,
        )
        return verdict.standing is Standing.COUNTS

    def _frames(self, stretch: Stretch, after: Position) -> Iterator[Frame]:
        assert stretch.upto is not None
        link, request = self._link, self._link.new_id()
        link.send(
            {
                "op": "replay",
                "id": request,
                "origin": stretch.origin,
                "incarnation": stretch.incarnation,
                "position": list(after),
                "credit": CREDIT_BYTES,
            }
        )
        over, silent = False, 0.0
        try:
            while not over:
                received = link.receive(STEP_S)
                if received is None:
                    silent += STEP_S
                    if silent >= SILENCE_S:
                        raise UnreachableError("the broker sends nothing of the journal")
                    continue
                silent = 0.0
                message, parts = received
                if message.get("id") != request:
                    self._other(message, parts)
                elif message["op"] == "frame":
                    size = 0
                    for frame in read_frames(parts):
                        if frame.prev.complete and frame.prev.lsn >= stretch.upto:
                            return
                        size += frame.size
                        yield frame
                    link.send({"op": "credit", "id": request, "bytes": size})
                elif message["op"] == "end":
                    over = True
                elif message["op"] == "error":
                    over = True
                    error = error_from(message)
                    # Forgotten since it was asked what is held: the next run says so in the file.
                    raise UnreachableError(error.message) if isinstance(error, ResyncRequiredError) else error
        finally:
            if not over:
                link.send({"op": "cancel", "id": request})
