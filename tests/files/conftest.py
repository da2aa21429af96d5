"""What the tests of trees of files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmgsync.core.trees import Tree
from tests.files.pair import Pair


@pytest.fixture
def new_pair(tmp_path: Path) -> Iterator[Callable[[Tree], Pair]]:
    made: list[Pair] = []

    def make(tree: Tree) -> Pair:
        made.append(Pair(tmp_path, tree))
        return made[-1]

    yield make
    for pair in made:
        pair.intake.close()
        pair.cache.close()
