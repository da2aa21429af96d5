"""Findings: what a check has found, a value with its remedy. A check that could not run is an error, not a finding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pmgsync.errors import PreflightError


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check. One that is ok and has a `problem` is for information: nobody need do anything."""

    check: str
    ok: bool
    problem: str = ""
    remedy: str = ""


def judged(check: str, ok: bool, problem: str, remedy: str) -> Finding:
    """Return a finding that has problem and remedy only when it is not ok."""
    return Finding(check, ok) if ok else Finding(check, ok, problem, remedy)


def raise_for(findings: Iterable[Finding]) -> None:
    """Return when every finding is ok.

    Raises:
        PreflightError: with every problem and its remedy.
    """
    bad = [finding for finding in findings if not finding.ok]
    if len(bad) == 1:
        raise PreflightError(bad[0].problem, hint=bad[0].remedy)
    if bad:
        lines = [f"  - {finding.problem}: {finding.remedy}" for finding in bad]
        raise PreflightError("\n".join([f"{len(bad)} things must be put right first", *lines]))
