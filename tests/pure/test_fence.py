"""What the broker wants of a master's guard, and what stands, while both change."""

from __future__ import annotations

from pmgsync.agent.fence import Fence


def stands(fence: Fence) -> bool:
    return fence.is_as_wanted


def test_what_is_wanted_is_wanted_of_one_epoch() -> None:
    """By the document of another one nothing is done: its master may not be the master any more."""
    fence = Fence()
    assert fence.wanted(1) is None
    fence.want(1, fenced=True)
    assert fence.wanted(1) is True and fence.wanted(2) is None
    fence.stands(1, fenced=True)
    fence.want(2, fenced=False)
    assert fence.wanted(1) is None and not stands(fence)
    fence.stands(2, fenced=False)
    assert stands(fence) and fence.refuses(2)


def test_a_guard_that_is_taken_away_does_not_count_as_standing_when_it_is_wanted_again() -> None:
    """A handover that is begun in that moment waits until it stands."""
    fence = Fence()
    fence.want(1, fenced=True)
    fence.stands(1, fenced=True)
    assert stands(fence)
    fence.want(1, fenced=False)
    assert fence.wanted(1) is False  # from here on it is taken away
    fence.want(1, fenced=True)
    assert not stands(fence)
    fence.stands(1, fenced=False)
    assert not stands(fence)


def test_a_change_is_waited_for_once() -> None:
    fence = Fence()
    assert not fence.wait(0)
    fence.want(1, fenced=True)
    assert fence.wait(0) and not fence.wait(0)
    fence.want(1, fenced=True)
    assert not fence.wait(0)
