"""What the tests with mpiexec share."""

from __future__ import annotations

import pytest
from training import Training


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the parameters after 60 steps on 3 ranks to which nothing happens."""
    place = tmp_path_factory.mktemp("undisturbed")
    summary = Training(place / "run", ["--nproc", "3"]).start().finish()
    assert summary["failures"] == []
    assert summary["steps"] == 60
    digest: str = summary["params_sha256"]
    return digest
