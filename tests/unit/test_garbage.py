"""How often Python looks for garbage while a script starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from hpcft.world import garbage


@pytest.fixture(autouse=True)
def threshold() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_seldom_and_then_as_usual(threshold: tuple[int, int, int]) -> None:
    garbage.seldom()
    assert gc.get_threshold()[0] > threshold[0]
    garbage.as_usual()
    assert gc.get_threshold() == threshold


def test_what_the_script_says_stays() -> None:
    garbage.seldom()
    gc.set_threshold(50, 5, 5)
    garbage.as_usual()
    assert gc.get_threshold() == (50, 5, 5)
