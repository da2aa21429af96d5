"""Errors on the wire: every class travels under a name of PROTOCOL.md and arrives as what that name stands for."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import broker
import pmgsync
from pmgsync.errors import PmgsyncError
from pmgsync.wire.messages import ERRORS, error_from, error_map, pack, unpack

for package in (pmgsync, broker):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def classes(root: type[PmgsyncError] = PmgsyncError) -> Iterator[type[PmgsyncError]]:
    """Yield every exception class of pmgsync."""
    yield root
    for kind in root.__subclasses__():
        yield from classes(kind)


KINDS = sorted(
    # Those of the command line do not travel.
    {kind for kind in classes() if not kind.__module__.startswith("cli.")},
    key=lambda kind: kind.__qualname__,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_arrives_as_the_nearest_class_that_has_a_name(kind: type[PmgsyncError]) -> None:
    named = next(parent for parent in kind.__mro__ if "code" in vars(parent))
    assert ERRORS[kind.code] is named
    assert type(error_from(error_map(1, kind("sentence")))) is named


def test_names_are_those_of_the_protocol() -> None:
    page = Path(__file__).parents[2].joinpath("PROTOCOL.md").read_text()
    section = page.partition("\n## 9. ")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(ERRORS)


@given(
    kind=st.sampled_from(KINDS), message=st.text(), hint=st.text(), recoverable=st.booleans(), request=st.integers(0)
)
def test_sentences_and_recoverable_survive_the_way(
    kind: type[PmgsyncError], message: str, hint: str, recoverable: bool, request: int
) -> None:
    sent = kind(message, hint=hint)
    sent.recoverable = recoverable
    answer = unpack(pack(error_map(request % (1 << 63), sent)))
    came = error_from(answer)
    assert (came.code, came.message, came.hint, came.recoverable) == (sent.code, message, hint, recoverable)
    assert answer["id"] == request % (1 << 63)


def test_a_name_that_is_not_known_is_a_failure() -> None:
    came = error_from({"op": "error", "error": "from_a_later_version", "message": "no"})
    assert (type(came), came.message, came.recoverable) == (PmgsyncError, "no", False)
