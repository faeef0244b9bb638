"""A slice of the campaign; ``tests/fault/campaign.py`` runs as much of it as one likes."""

from __future__ import annotations

import os
import random

import pytest
from campaign import campaign, draw

pytestmark = [pytest.mark.fault, pytest.mark.slow]


def test_a_slice_of_the_campaign() -> None:
    seed = int(os.environ.get("HPCFT_FAULT_SEED", random.randrange(10**6)))
    print(f"HPCFT_FAULT_SEED={seed}")
    wrong = [verdict for _, verdict in campaign(10, seed) if verdict]
    assert not wrong, f"HPCFT_FAULT_SEED={seed}\n" + "\n".join(wrong)


def test_a_plan_follows_from_its_seed() -> None:
    assert draw("1.2") == draw("1.2")
    assert draw("1.2") != draw("1.3")
