"""A TCP proxy between two brokers that does to their connections what networks do: cuts, holes, delay, damage."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

CHUNK = 64 << 10


class Way(Enum):
    """A direction; UP is from whoever connects to whoever listens."""

    UP = "up"
    DOWN = "down"


BOTH = (Way.UP, Way.DOWN)


class _Thread:
    """One event loop in a daemon thread, shared by all proxies of the test process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="proxy", daemon=True).start()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine there and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)


_shared: list[_Thread] = []


def _thread() -> _Thread:
    if not _shared:
        _shared.append(_Thread())
    return _shared[0]


class Proxy:
    """Stands in front of one port. A fault holds for present and future connections until `heal`.

    A hole holds bytes back, as a network does whose packets are lost: what TCP still has arrives when it ends.

    Attributes:
        port: where to connect instead.
        accepted: connections so far.
        flipped: bits flipped so far.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.accepted = 0
        self.flipped = 0
        self._delay_s = 0.0
        self._bytes_per_s = 0
        self._flips: dict[Way, int] = dict.fromkeys(Way, 0)
        self._refusing = False
        self._flapping: asyncio.Task[None] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gates: dict[Way, asyncio.Event] = {}
        self._server: asyncio.Server | None = None
        _thread().run(self._start())

    async def _start(self) -> None:
        for way in Way:
            self._gates[way] = asyncio.Event()
            self._gates[way].set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    # -- faults -------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Close every connection."""
        self._do(self._close_all)

    def refuse(self) -> None:
        """Close every connection, and new ones as soon as they come."""
        self._refusing = True
        self.cut()

    def hole(self, ways: Sequence[Way] = BOTH) -> None:
        """Forward nothing in these directions any more, neither bytes nor the end of a connection."""
        for way in ways:
            self._do(self._gates[way].clear)

    def delay(self, seconds: float) -> None:
        """Deliver everything later."""
        self._delay_s = seconds

    def throttle(self, bytes_per_s: int) -> None:
        """Forward no more than so much in each direction of each connection."""
        self._bytes_per_s = bytes_per_s

    def flap(self, interval_s: float) -> None:
        """Cut again and again."""

        async def flapping() -> None:
            while True:
                await asyncio.sleep(interval_s)
                self._close_all()

        def begin() -> None:
            self._flapping = asyncio.get_running_loop().create_task(flapping())

        self._do(begin)

    def flip_bits(self, count: int, ways: Sequence[Way] = BOTH) -> None:
        """Flip one bit in each of the next `count` chunks in these directions."""
        for way in ways:
            self._flips[way] = count

    def heal(self) -> None:
        """End every fault."""
        self._refusing = False
        self._delay_s, self._bytes_per_s = 0.0, 0
        self._flips = dict.fromkeys(Way, 0)

        def reset() -> None:
            if self._flapping is not None:
                self._flapping.cancel()
                self._flapping = None
            for gate in self._gates.values():
                gate.set()

        self._do(reset)

    def close(self) -> None:
        """End the proxy."""
        self.heal()

        async def end() -> None:
            assert self._server is not None
            self._server.close()
            self._close_all()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        _thread().run(end())

    # -- connections --------------------------------------------------------------------------------------------------

    @staticmethod
    def _do(act: Callable[[], object]) -> None:
        async def acting() -> None:
            act()

        _thread().run(acting())

    def _close_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        pumps = [
            asyncio.ensure_future(self._pump(reader, far_writer, Way.UP)),
            asyncio.ensure_future(self._pump(far_reader, writer, Way.DOWN)),
        ]
        self._tasks.update(pumps)
        try:
            await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            self._tasks.difference_update(pumps)
            self._writers -= {writer, far_writer}
            for each in (writer, far_writer):
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        """Forward one direction; what waits for its time does not keep what follows from being read."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def read() -> None:
            while True:
                try:
                    data = await reader.read(4096 if self._bytes_per_s else CHUNK)
                except OSError:
                    data = b""
                await waiting.put((loop.time() + self._delay_s, data))
                if not data:
                    return

        reading = asyncio.ensure_future(read())
        try:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._gates[way].wait()
                if not data:
                    return
                writer.write(self._damaged(data, way))
                with contextlib.suppress(OSError):
                    await writer.drain()
                if self._bytes_per_s:
                    await asyncio.sleep(len(data) / self._bytes_per_s)
        finally:
            reading.cancel()
            writer.transport.abort()

    def _damaged(self, data: bytes, way: Way) -> bytes:
        if not self._flips[way]:
            return data
        self._flips[way] -= 1
        self.flipped += 1
        broken = bytearray(data)
        broken[len(broken) // 2] ^= 1 << len(broken) % 8
        return bytes(broken)


class Link:
    """The proxies in front of one broker's ports; every fault is put on all of them."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.proxies = [Proxy(port) for port in ports]
        self.ports = [proxy.port for proxy in self.proxies]

    def each(self, act: Callable[[Proxy], object]) -> None:
        """Do something to every proxy."""
        for proxy in self.proxies:
            act(proxy)

    def heal(self) -> None:
        """End every fault."""
        self.each(Proxy.heal)

    def close(self) -> None:
        """End the proxies."""
        self.each(Proxy.close)
