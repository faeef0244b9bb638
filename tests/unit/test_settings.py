"""What a rank's Open MPI is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.launch.settings import has_fabric, local_settings, rank_settings


def test_a_fabric_is_what_has_a_device(tmp_path: Path) -> None:
    assert not has_fabric(tmp_path)
    (tmp_path / "infiniband").mkdir()
    assert not has_fabric(tmp_path)
    (tmp_path / "infiniband" / "mlx5_0").mkdir()
    assert has_fabric(tmp_path)
    assert not has_fabric(tmp_path / "infiniband")
    (tmp_path / "infiniband" / "cxi" / "cxi0").mkdir(parents=True)
    assert has_fabric(tmp_path / "infiniband")


def test_the_users_own_settings_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_MCA_pml", raising=False)
    assert rank_settings(None, 1, None, tmp_path)["OMPI_MCA_pml"] == "ob1"
    monkeypatch.setenv("OMPI_MCA_pml", "ucx")
    assert "OMPI_MCA_pml" not in rank_settings(None, 1, None, tmp_path)


def test_a_script_is_told_which_process_of_its_node_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert local_settings(2, 4) == {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    # A wrapper of the user's knows better.
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert local_settings(2, 4) == {"LOCAL_WORLD_SIZE": "4"}
