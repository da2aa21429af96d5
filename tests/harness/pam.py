"""PAM services made for a test, which know one password."""

from __future__ import annotations

import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PAM = Path("/etc/pam.d")
SECRET = "korrekt Pferd ☂ 'battery'"
SCRIPT = """#!/bin/sh
# pam_exec writes the password and a NUL byte to standard input.
given="$(tr -d '\\000')"
{before}
[ "$given" = "$(cat {secret})" ]
"""

Make = Callable[[str], str]


@contextmanager
def pam_services(directory: Path) -> Iterator[Make]:
    """Make PAM services that know one password; `before` is shell that runs before it is looked at."""
    made: list[Path] = []
    (directory / "secret").write_text(SECRET)

    def make(before: str = ":") -> str:
        script = directory / f"check{len(made)}"
        script.write_text(SCRIPT.format(before=before, secret=directory / "secret"))
        script.chmod(stat.S_IRWXU)
        service = PAM / f"pmgsync-test-{secrets.token_hex(4)}"
        made.append(service)
        service.write_text(f"auth required pam_exec.so quiet expose_authtok {script}\naccount required pam_permit.so\n")
        return service.name

    try:
        yield make
    finally:
        for service in made:
            service.unlink()
