"""What the tests with mpiexec share."""

from __future__ import annotations

import pytest
import training


@pytest.fixture
def undisturbed() -> str:
    """Digest of the parameters after 60 steps on 3 ranks to which nothing happens."""
    return training.undisturbed(3)[60]
