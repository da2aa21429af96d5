"""The broker's one loop: it polls sockets and descriptors, runs timers, and never blocks elsewhere."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable

import zmq

from pmgsync.wire.parts import has_message, receive_parts

Socket = zmq.Socket[bytes]
MAX_BATCH = 200
"""Messages taken from one socket before the others get their turn."""


class Loop:
    """Callbacks by socket and by time, on the monotonic clock."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._callbacks: dict[Socket | int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, float | None, Callable[[], None]]] = []
        self._order = itertools.count()
        self._running = False

    def add_socket(self, socket: Socket, receive: Callable[[list[zmq.Frame]], None]) -> None:
        """Call `receive` with every message that arrives."""

        def drain() -> None:
            for _ in range(MAX_BATCH):
                try:
                    parts = receive_parts(socket)
                except zmq.Again:  # another callback has taken it
                    return
                receive(parts)
                if socket.closed or socket not in self._callbacks or not has_message(socket):
                    return

        self._callbacks[socket] = drain
        self._poller.register(socket, zmq.POLLIN)

    def add_descriptor(self, descriptor: int, ready: Callable[[], None]) -> None:
        """Call `ready` whenever a file descriptor can be read."""
        self._callbacks[descriptor] = ready
        self._poller.register(descriptor, zmq.POLLIN)

    def await_room(self, descriptor: int, *, waits: bool) -> None:
        """Call what was given to `add_descriptor` also when the descriptor can be written, as long as `waits` says."""
        if descriptor in self._callbacks:
            self._poller.register(descriptor, zmq.POLLIN | zmq.POLLOUT if waits else zmq.POLLIN)

    def remove(self, source: Socket | int) -> None:
        """Forget a socket or descriptor; unknown ones are ignored."""
        if self._callbacks.pop(source, None) is not None:
            self._poller.unregister(source)

    def every(self, interval_s: float, run: Callable[[], None]) -> None:
        """Call `run` again and again, `interval_s` seconds from the end of one run to the start of the next."""
        heapq.heappush(self._timers, (time.monotonic() + interval_s, next(self._order), interval_s, run))

    def once(self, delay_s: float, run: Callable[[], None]) -> None:
        """Call `run` once, after `delay_s` seconds."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), None, run))

    def stop(self) -> None:
        """Make `run` return after the callback that is running."""
        self._running = False

    def run(self) -> None:
        """Serve until `stop` is called."""
        self._running = True
        while self._running:
            wait = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else 1.0
            ready = self._poller.poll(round(wait * 1000 + 0.499))
            for source, _ in ready:
                callback = self._callbacks.get(source)
                if callback is not None:
                    callback()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                _, _, interval, run = heapq.heappop(self._timers)
                run()
                if interval is not None:
                    self.every(interval, run)
