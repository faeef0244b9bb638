"""What tests without ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import Disk, mounted


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own."""
    with mounted(tmp_path) as made:
        yield made
