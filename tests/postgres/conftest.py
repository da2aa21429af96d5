"""Fixtures that several files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.profile import Profile
from pmgsync.profile_file import load_profile
from tests.harness.apply_pairs import MakePair
from tests.harness.server import ORIGIN, Pair, make_profile


@pytest.fixture
def make_pair(server: EmbeddedPostgres) -> Iterator[MakePair]:
    made: list[Pair] = []

    def make(
        schema: str,
        profile: Profile | None = None,
        *,
        target: str | None = None,
        options: str = "",
        origin: int = ORIGIN,
    ) -> Pair:
        pair = Pair(server, profile or make_profile(), options=options, origin=origin)
        made.append(pair)
        pair.setup(schema, target=target)
        return pair

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def mirror() -> Profile:
    return load_profile("mirror")
