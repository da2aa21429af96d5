"""The small transactions of a frame planned as one, where what each comes to is the same by itself.

A node that catches up gets frames of hundreds of transactions, mostly of tables that are known. Their
plan is by table, as the bulk executor wants it. When executing it fails they are planned anew, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pmgsync.core.frames import Frame
from pmgsync.core.judges import Judge
from pmgsync.core.positions import Position
from pmgsync.core.together import together
from pmgsync.errors import PmgsyncError
from pmgsync.postgres.apply import bulk
from pmgsync.postgres.apply.plan import PlannedTransaction
from pmgsync.postgres.apply.planner import Planner


def planned_together(
    planner: Planner,
    judge: Judge,
    frame: Frame,
    messages: Sequence[bytes],
    reached: Position,
    waited: Callable[[], bool],
) -> PlannedTransaction | None:
    """Return the plan of a frame's transactions as one, None when they are to be planned one by one.

    Args:
        reached: what precedes the frame; none of its transactions may be in already.
        waited: says whether the judge has waited for something, after which tables are to be looked at again.

    Raises:
        ProtocolError: when a message is malformed.
    """
    # Fewer are executed row by row, in order.
    if frame.header.changes < bulk.LEAST_ITEMS:
        return None
    found = together(messages, reached.lsn)
    if found is None or found.rows < bulk.LEAST_ITEMS or found.last > frame.here.lsn:
        return None
    if not judge.alike(found.first, found.last):
        return None
    try:
        writers = judge.writers(frame.header, found.first)
    except PmgsyncError:
        # One of the first may come before what is to be waited for.
        return None
    planner.set_writers(writers)
    items = None if waited() else planner.plan_together(found.changes)
    if items is None:
        return None
    apart = partial(planner.plan_apart, messages, reached.lsn, writers)
    return PlannedTransaction(found.last, found.commit_time_us, items, found.transactions, apart)
