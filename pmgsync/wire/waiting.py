"""Waiting: the one place where a worker blocks, for sockets, descriptors and a wake-up from its own threads."""

from __future__ import annotations

import math
import os
import select

from pmgsync.wire.link import BrokerLink

Source = BrokerLink | int


class Wakeup:
    """Ends another thread's wait."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor that can be read after `wake`."""
        return self._descriptor

    def wake(self) -> None:
        """End the wait, or the next one; may be called from any thread, and often."""
        os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Clear the wake-ups so far; look at what they announced only after this."""
        try:
            os.eventfd_read(self._descriptor)
        except BlockingIOError:
            return  # nobody has called

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


class Waiter:
    """Waits until one of its sources has something, or somebody called `wakeup.wake`, or time is over."""

    def __init__(self, *sources: Source, wakeup: Wakeup | None = None) -> None:
        self._poll = select.poll()
        self._links: list[BrokerLink] = []
        self._wakeup = wakeup
        if wakeup is not None:
            self._poll.register(wakeup.fileno(), select.POLLIN)
        for source in sources:
            self.watch(source)

    def watch(self, source: Source) -> None:
        """Let a source end the wait from now on."""
        if isinstance(source, BrokerLink):
            self._links.append(source)
        self._poll.register(source, select.POLLIN)

    def ignore(self, source: int) -> None:
        """Let a descriptor not end the wait any more."""
        self._poll.unregister(source)

    def wait(self, timeout_s: float) -> None:
        """Wait, at most so many seconds; wake-ups are cleared before this returns."""
        for link in self._links:
            if link.has_read:
                timeout_s = 0.0
        ready = self._poll.poll(math.ceil(max(0.0, timeout_s) * 1000))
        if self._wakeup is not None and self._wakeup.fileno() in dict(ready):
            self._wakeup.clear()
