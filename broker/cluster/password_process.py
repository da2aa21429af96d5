"""The process that asks PAM about one password: `python -m broker.cluster.password_process SERVICE USER`.

It reads the password from standard input up to its end, and writes one line: `good`, or why not.
"""

from __future__ import annotations

import signal
import sys

LIMIT_S = 30
"""A module that hangs is ended by the kernel, whatever it waits for; there is no answer then."""


def main(service: str, user: str) -> None:
    """Ask, and print the outcome."""
    signal.alarm(LIMIT_S)
    password = sys.stdin.buffer.read()
    from pam import PamAuthenticator

    authenticator = PamAuthenticator()
    # A question only: nobody logs in, so no credentials are made.
    good = authenticator.authenticate(user, password, service=service, resetcreds=False)
    answer = "good" if good else f"{authenticator.reason} ({authenticator.code})"
    sys.stdout.write(answer.replace("\n", " ") + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
