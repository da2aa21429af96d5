"""A process that stands between a slave and its master and cuts and mends their connections when told to.

    python -m tests.bench.cut PORT:TARGET...

It listens on each PORT of the loopback address, forwards to its TARGET there, and takes `cut` and `mend` on standard
input. After `mend` it writes the time of the first new connection (monotonic). A process of its own, so that it shares
no interpreter lock with what is measured.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

ADDRESS = "127.0.0.1"
CHUNK = 256 << 10


class _Switch:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_cut = False
        self.tell = False
        self.open: set[socket.socket] = set()

    def cut(self) -> None:
        with self.lock:
            self.is_cut = True
            for each in self.open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        with self.lock:
            self.is_cut, self.tell = False, True


def _pump(source: socket.socket, sink: socket.socket) -> None:
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while size := source.recv_into(buffer):
            sink.sendall(view[:size])
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def _serve(switch: _Switch, listener: socket.socket, target: tuple[str, int]) -> None:
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(target)
        except OSError:
            near.close()
            continue
        with switch.lock:
            if switch.is_cut:
                near.close()
                far.close()
                continue
            if switch.tell:
                switch.tell = False
                sys.stdout.write(f"{time.monotonic()}\n")
                sys.stdout.flush()
            switch.open |= {near, far}
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for pair in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=pair, daemon=True).start()


def main() -> None:
    """Serve until standard input ends."""
    switch = _Switch()
    for pair in sys.argv[1:]:
        port, target = map(int, pair.split(":"))
        listener = socket.create_server((ADDRESS, port))
        threading.Thread(target=_serve, args=(switch, listener, (ADDRESS, target)), daemon=True).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        (switch.cut if line.strip() == "cut" else switch.mend)()


if __name__ == "__main__":
    main()
