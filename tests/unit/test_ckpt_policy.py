"""Which checkpoints are kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.ckpt.policy import Best, Policy, Retention
from hpcft.ckpt.store import STATE, Checkpoint, Store


def saved(store: Store, step: int, **metrics: float) -> Checkpoint:
    aside = store.begin(1)
    (aside / STATE).write_bytes(b"")
    return store.commit(aside, step, metrics)


@given(
    st.lists(st.integers(0, 40), max_size=12),
    st.integers(1, 5),
    st.integers(0, 7),
)
def test_the_newest_and_every_nth_stay(steps: list[int], newest: int, nth: int) -> None:
    checkpoints = [
        Checkpoint(step, steps[:i].count(step) + 1, Path(f"{i}")) for i, step in enumerate(steps)
    ]
    surplus = Retention(newest, nth).surplus(checkpoints)
    assert surplus == sorted(surplus)
    assert not set(surplus) & set(sorted(checkpoints)[-newest:])
    kept = set(checkpoints) - set(surplus)
    assert len(kept) >= min(newest, len(checkpoints))
    assert all(nth and c.step % nth == 0 for c in kept - set(sorted(checkpoints)[-newest:]))
    assert not any(nth and c.step % nth == 0 for c in surplus)


@pytest.mark.parametrize(
    ("best", "kept"),
    [
        # Of two that are equally good, the later is the better.
        (Best("loss", False, 1), [4, 5]),
        (Best("loss", False, 2), [2, 4, 5]),
        (Best("accuracy", True, 1), [1, 5]),
        (Best("accuracy", True, 9), [1, 2, 5]),
        (Best("none has it", True, 2), [5]),
    ],
)
def test_the_best_stay(tmp_path: Path, best: Best, kept: list[int]) -> None:
    store = Store(tmp_path)
    saved(store, 1, loss=3.0, accuracy=0.5)
    saved(store, 2, loss=1.0, accuracy=0.25)
    saved(store, 3, loss=float("nan"))
    saved(store, 4, loss=1.0, accuracy=float("inf"))
    saved(store, 5)
    for old in Retention(1, 0, best).surplus(store.committed()):
        store.remove(old)
    assert [c.step for c in store.committed()] == kept


def test_metrics_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    good = saved(store, 1, loss=0.5)
    assert good.metrics == {"loss": 0.5}
    file = good.path / "metrics.json"
    for text in ("", "[1]", '{"loss": "low"}', '{"loss": ', "\xff", '{"loss": null}'):
        file.write_text(text, encoding="latin-1")
        assert good.metrics == {}
    file.unlink()
    assert good.metrics == {}


@pytest.mark.parametrize("best", [None, Best("loss", False, 2)])
def test_a_policy_travels_as_json(best: Best | None) -> None:
    policy = Policy("/ck", 5.0, True, Retention(3, 10, best), 1 << 30, 0, True, 120.0)
    assert Policy.of(json.loads(json.dumps(asdict(policy)))) == policy
