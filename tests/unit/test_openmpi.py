"""Finding the Open MPI to use, and saying what is wrong with one that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpcft.errors import UsageError
from hpcft.launch import openmpi
from hpcft.launch.openmpi import Binding, OpenMPI
from hpcft.world.versions import known_problem


def install(place: Path, mpiexec: str, info: str = "", library: bool = True) -> Path:
    """Lay out an MPI whose programs say what they are told to; return its directory of programs."""
    programs = place / "bin"
    programs.mkdir(parents=True)
    for name, text in (("mpiexec", mpiexec), ("ompi_info", info)):
        if text:
            (programs / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
            (programs / name).chmod(0o755)
    if library:
        (place / "lib").mkdir()
        (place / "lib" / "libmpi.so.40").touch()
    return programs


def test_the_one_of_this_environment_is_found_and_complete() -> None:
    found = openmpi.find()
    openmpi.require_fault_tolerance(found)
    binding = openmpi.require_mpi4py(found)
    assert binding.openmpi_version == found.version
    assert found.mpiexec.exists()


def test_the_environments_own_goes_before_the_one_on_path(tmp_path: Path) -> None:
    text = "mpiexec (Open MPI) {}"
    info = "options:ft_mpi_support:yes"
    install(tmp_path / "env", text.format("5.0.9"), info)
    on_path = install(tmp_path / "site", text.format("5.0.3"), info)
    assert openmpi.find(tmp_path / "env", str(on_path)).version == "5.0.9"
    assert openmpi.find(tmp_path / "nothing", str(on_path)).version == "5.0.3"


def test_an_mpich_in_the_environment_is_passed_over(tmp_path: Path) -> None:
    install(tmp_path / "env", "HYDRA build details:", library=False)
    on_path = install(tmp_path / "site", "mpiexec (Open MPI) 5.0.3", "ompi:version:full:5.0.3")
    found = openmpi.find(tmp_path / "env", str(on_path))
    assert found.prefix == tmp_path / "site"
    assert not found.ulfm


def test_a_prefix_that_cannot_be_seen_is_the_configured_one(tmp_path: Path) -> None:
    on_path = install(
        tmp_path / "usr", "mpiexec (Open MPI) 5.0.3", "path:prefix:/usr/lib/openmpi", library=False
    )
    assert openmpi.find(tmp_path / "none", str(on_path)).prefix == Path("/usr/lib/openmpi")


def test_no_mpi(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no mpiexec") as caught:
        openmpi.find(tmp_path, str(tmp_path))
    assert "pip install" in caught.value.remedy
    assert caught.value.exit_code == 2


def test_another_mpi(tmp_path: Path) -> None:
    on_path = install(tmp_path, "HYDRA build details:\n    Version: 4.1")
    with pytest.raises(UsageError, match="not Open MPI's"):
        openmpi.find(tmp_path / "none", str(on_path))


@pytest.mark.parametrize(("version", "ulfm"), [("5.0.3", False), ("4.1.4", False), ("4.1.4", True)])
def test_without_fault_tolerance(version: str, ulfm: bool) -> None:
    with pytest.raises(UsageError, match="fault tolerance") as caught:
        openmpi.require_fault_tolerance(OpenMPI(Path("mpiexec"), version, ulfm, Path("/opt")))
    assert "with-ft" in caught.value.remedy


def test_mpi4py_of_another_mpi() -> None:
    mine = OpenMPI(Path("/opt/bin/mpiexec"), "5.0.3", True, Path("/opt"))
    for said in ("Open MPI v4.1.4, package: Debian", "MPICH Version:      4.1"):
        with pytest.raises(UsageError, match="mpi4py uses"):
            openmpi.require_mpi4py(mine, Binding(said, None))


def test_no_mpi4py(tmp_path: Path) -> None:
    # -S leaves out site-packages, where mpi4py is.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UsageError, match="mpi4py is not installed"):
        openmpi.mpi4py_binding(str(bare))


def test_versions_that_crash_are_known() -> None:
    def problem(version: str) -> str:
        return known_problem(version)

    assert "5.0.9" in problem("5.0.11")
    assert problem("5.0.9") == ""
