"""The check of the master's root password for a node that joins with it: by PAM, each in a process of its own.

PAM modules block (a wrong password costs seconds on purpose), may keep what they were given, and may crash: none of
that is to happen to the broker. The password goes to that process through a pipe, stands in no argument list and in no
environment, and is gone with the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Protocol

from broker.net.loop import Loop
from pmgsync.errors import MembershipError, TooManyAttemptsError

log = logging.getLogger(__name__)

USER = "root"
MAX_BYTES = 1024
"""Of a password, in UTF-8; a pipe takes so much without making the writer wait."""
MAX_OPEN = 4
"""Checks at one time: guesses wait in a queue, and do not fill this machine with processes."""
MAX_ANSWER = 500
GOOD = b"good"

Done = Callable[[bool], None]


class PasswordCheck(Protocol):
    """Tells whether a password is the one that lets a node join."""

    def start(self, password: str, done: Done) -> None:
        """Begin a check; `done` is called from the loop with its outcome.

        Raises:
            MembershipError: when it cannot be begun.
        """


class PamPassword:
    """Asks PAM; implements `PasswordCheck`."""

    def __init__(self, loop: Loop, service: str, *, user: str = USER) -> None:
        """Prepare.

        Args:
            service: of PAM, a file in /etc/pam.d; "" refuses every password.
        """
        self._loop = loop
        self._service = service
        self._user = user
        self._open: dict[int, tuple[subprocess.Popen[bytes], Done]] = {}

    def start(self, password: str, done: Done) -> None:
        """Begin a check; `done` is called from the loop with its outcome.

        Raises:
            MembershipError: when passwords are not taken here, or this one cannot be one.
            TooManyAttemptsError: when too many checks are under way.
        """
        secret = password.encode("utf-8", "replace")
        if not self._service:
            raise MembershipError(
                "this master takes no password", hint="run `pmgcm join-cmd` on the master for a token"
            )
        if not secret or len(secret) > MAX_BYTES or b"\0" in secret:
            raise MembershipError(f"a password has 1 to {MAX_BYTES} bytes, and no NUL byte")
        if len(self._open) >= MAX_OPEN:
            raise TooManyAttemptsError("too many passwords are being checked now", hint="try again in a while")
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "broker.cluster.password_process", self._service, self._user],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                # What PAM finds in it is the asker's, not the broker's.
                env={key: value for key, value in os.environ.items() if key not in {"DISPLAY", "XAUTHORITY"}},
            )
        except OSError as error:
            log.error("action=password-check error=%s", error)
            raise MembershipError("the master cannot check passwords now", hint="its log says why") from error
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(secret)
            process.stdin.close()
        except OSError:
            pass  # it has ended already, which is an answer, too
        descriptor = process.stdout.fileno()
        self._open[descriptor] = (process, done)
        self._loop.add_descriptor(descriptor, lambda: self._answered(descriptor))

    def close(self) -> None:
        """End the checks that are under way; nobody is told their outcome."""
        for descriptor in list(self._open):
            self._end(descriptor)

    def _answered(self, descriptor: int) -> None:
        answer = os.read(descriptor, MAX_ANSWER)
        done = self._end(descriptor)
        good = answer.strip() == GOOD
        if not good:
            # Why is for this machine's log only: whoever asks is not told which part was wrong.
            reason = answer.decode("utf-8", "replace").strip() or "no answer in time"
            log.warning("action=password-refused service=%s reason=%s", self._service, ascii(reason))
        done(good)

    def _end(self, descriptor: int) -> Done:
        process, done = self._open.pop(descriptor)
        self._loop.remove(descriptor)
        with contextlib.suppress(ProcessLookupError):
            # With what its modules have started.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        return done
