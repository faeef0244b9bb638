"""What hpcft doctor finds, one check at a time; the trials are in tests/mpi and tests/slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcft.launch import checks
from hpcft.launch.checks import Level
from hpcft.launch.interface import address_towards, network_of


def test_this_environment() -> None:
    assert checks.python().level is Level.OK
    assert checks.torch().level is Level.OK


def test_ucx_is_refused() -> None:
    found = checks.messaging({"OMPI_MCA_pml": "ucx"})
    assert found.level is Level.FAIL
    assert "unset OMPI_MCA_pml" in found.remedy
    assert checks.messaging({}).level is Level.OK


def test_more_ranks_than_processors() -> None:
    cores = len(os.sched_getaffinity(0))
    assert checks.processors(cores).level is Level.OK
    assert checks.processors(cores + 1).level is Level.WARN


def test_memory_is_found() -> None:
    assert [finding for finding in checks.memory() if finding.subject == "memory"]


def test_a_run_directory_that_is_to_be_made(tmp_path: Path) -> None:
    (found,) = checks.run_directory(tmp_path / "not" / "yet", nodes=1)
    assert found.level in (Level.OK, Level.WARN)  # a warning if the disk is nearly full
    assert str(tmp_path) in found.text
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_cannot_be_made() -> None:
    (found,) = checks.run_directory(Path("/proc/hpcft"), nodes=1)
    assert found.level is Level.FAIL
    assert "--run-dir" in found.remedy


def test_a_local_filesystem_for_several_nodes() -> None:
    found = list(checks.run_directory(Path("/dev/shm"), nodes=2))
    assert any("tmpfs" in finding.text and finding.level is Level.WARN for finding in found[1:])


def test_the_way_to_a_peer_and_its_network() -> None:
    address = address_towards("127.0.0.1")
    assert address == "127.0.0.1"
    assert network_of(address) == "127.0.0.0/8"
    assert network_of("192.0.2.1") is None  # reserved for documentation, so nobody's


def test_alone_no_network_is_needed() -> None:
    assert "loopback" in checks.interface(None, {}).text


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "1"}])
def test_slurm_is_missed_only_in_a_job(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = list(checks.slurm(None, environ))
    assert [finding.level for finding in found] == ([Level.FAIL] if environ else [])
