"""What a machine or an allocation can do for hpcft, found out by trying: ``hpcft doctor``."""

from __future__ import annotations

import enum
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import HpcftError, UsageError
from hpcft.launch import openmpi
from hpcft.launch.cgroup import memory_groups
from hpcft.launch.interface import address_towards, network_of
from hpcft.launch.place import SRUN_OPTIONS
from hpcft.launch.scratch import scratch
from hpcft.launch.settings import rank_settings
from hpcft.slurm import scontrol, srun
from hpcft.slurm.command import printed
from hpcft.slurm.step import Step, find_step
from hpcft.world.versions import known_problem

_TRIAL_SECONDS = 90.0  # ten times what a cold start of three ranks takes on a slow filesystem
_LITTLE_SPACE = 1 << 30
_LITTLE_SHARED_MEMORY = 256 << 20
_LITTLE_MEMORY = 4 << 30

#: Filesystems that one node sees alone, so that a run over several cannot share a directory there.
_LOCAL_FILESYSTEMS = frozenset({"btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"})
#: An append of one client may overwrite another's: the appending is done by the client.
_NO_ATOMIC_APPEND = frozenset({"nfs", "nfs4"})


class Level(str, enum.Enum):
    """How good a finding is: WARN still lets hpcft run, FAIL does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    subject: what it is, in a word or two.
    level: how good it is.
    text: what was found.
    remedy: what to do about it; empty where nothing has to be done.
    """

    subject: str
    level: Level
    text: str
    remedy: str = ""


def examine(run_dir: Path, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at everything; findings come as they are made, the slow ones last.

    Parameters
    ----------
    run_dir
        Where run directories are to be; need not exist.
    environ
        The environment that tells whether this is a Slurm allocation or step.
    """
    step = find_step(environ)
    yield python()
    yield torch()
    mpi: openmpi.OpenMPI | None = None
    try:
        mpi = openmpi.find()
        openmpi.require_fault_tolerance(mpi)
        yield Finding("Open MPI", Level.OK, f"{mpi.version} at {mpi.prefix}, with fault tolerance")
        if problem := known_problem(mpi.version):
            yield Finding("Open MPI", Level.WARN, problem, "use 5.0.9")
    except UsageError as error:
        yield _failure("Open MPI", error)
    try:
        binding = openmpi.require_mpi4py(mpi) if mpi else openmpi.mpi4py_binding()
        version = importlib.metadata.version("mpi4py")
        yield Finding("mpi4py", Level.OK, f"{version}, bound to {binding.library or 'its MPI'}")
    except UsageError as error:
        yield _failure("mpi4py", error)
    yield messaging(environ)
    yield processors(step.tasks_here if step else None)
    yield from memory()
    yield shared_memory()
    yield from run_directory(run_dir, nodes=_nodes(environ))
    yield interface(step, environ)
    yield from slurm(step, environ)
    if mpi and mpi.ulfm:
        yield try_killed_rank(mpi, environ)
    if step is None and _nodes(environ) > 1:
        yield try_killed_rank_in_step(run_dir, _nodes(environ))


def python() -> Finding:
    """Which Python this is."""
    return Finding("Python", Level.OK, f"{sys.version.split()[0]} at {sys.prefix}")


def torch() -> Finding:
    """Whether torch is there; it is not imported, which would take seconds."""
    try:
        return Finding("torch", Level.OK, importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", Level.FAIL, "not installed", "pip install torch")


def messaging(environ: Mapping[str, str]) -> Finding:
    """Whether the messaging layer is one that reports failures."""
    pml = environ.get("OMPI_MCA_pml", "ob1")
    if pml != "ob1":
        return Finding(
            "messaging",
            Level.FAIL,
            f"OMPI_MCA_pml={pml} is set, and fault tolerance works through ob1 alone; the UCX "
            "layer does not report failures",
            "unset OMPI_MCA_pml (large GPU data is better left to NCCL than to MPI)",
        )
    return Finding("messaging", Level.OK, "ob1: shared memory and TCP; UCX is not used")


def processors(tasks: int | None) -> Finding:
    """Whether the ranks have a processor each.

    Parameters
    ----------
    tasks
        Ranks on this node, None if it is not known yet.
    """
    cores = len(os.sched_getaffinity(0))
    if tasks and tasks > cores:
        return Finding(
            "processors",
            Level.WARN,
            f"{tasks} ranks share {cores}; waiting ranks give way to others, and all are slow",
            "start fewer ranks a node, or ask for more with --cpus-per-task",
        )
    return Finding("processors", Level.OK, f"{cores} for this process; more ranks would share them")


def memory() -> Iterator[Finding]:
    """What limits memory: the machine, control groups, ulimit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, source = machine, "the machine's"
    for group, second in memory_groups():
        file = group / ("memory.max" if second else "memory.limit_in_bytes")
        text = _read(file).strip()
        if text.isdigit() and int(text) < limit:
            limit, source = int(text), f"limited by {file}"
    if limit < _LITTLE_MEMORY:
        yield Finding(
            "memory",
            Level.WARN,
            f"{_size(limit)}, {source}; the kernel kills what goes beyond",
            "ask for more (--mem), or start fewer ranks and spares on a node",
        )
    else:
        yield Finding("memory", Level.OK, f"{_size(limit)}, {source}")
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        yield Finding(
            "ulimit",
            Level.WARN,
            f"address space is limited to {_size(address_space)}, and torch maps much that it "
            "never uses",
            "ulimit -v unlimited",
        )


def shared_memory() -> Finding:
    """Whether the ranks of a node can exchange data by shared memory."""
    try:
        there = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", Level.WARN, str(error), "mount a tmpfs there")
    free = there.f_bavail * there.f_frsize
    if free < _LITTLE_SHARED_MEMORY:
        return Finding(
            "/dev/shm",
            Level.WARN,
            f"{_size(free)} free; ranks exchange their data through it",
            "make room, or start the container with a larger one (--shm-size)",
        )
    return Finding("/dev/shm", Level.OK, f"{_size(free)} free")


def run_directory(place: Path, nodes: int) -> Iterator[Finding]:
    """Whether run directories can be under ``place`` for a run over ``nodes`` nodes."""
    subject = "run directory"
    there = place.absolute()
    while not there.exists():
        there = there.parent
    try:
        kind = _filesystem(there)
        with tempfile.TemporaryDirectory(prefix=".hpcft-doctor-", dir=there) as folder:
            broken = _file_troubles(Path(folder))
        room = os.statvfs(there)
    except OSError as error:
        yield Finding(
            subject, Level.FAIL, f"{there}: {error.strerror}", "name another with --run-dir"
        )
        return
    free = room.f_bavail * room.f_frsize
    found = f"{there} ({kind}, {_size(free)} free)"
    if broken:
        yield Finding(subject, Level.FAIL, f"{found}: {broken}", "name another with --run-dir")
    elif free < _LITTLE_SPACE:
        yield Finding(subject, Level.WARN, found, "make room, or name another with --run-dir")
    else:
        yield Finding(subject, Level.OK, f"{found}: appends and renames are whole")
    if nodes > 1 and kind in _LOCAL_FILESYSTEMS:
        yield Finding(
            subject,
            Level.WARN,
            f"{kind} looks like this node's own, and a run needs the same directory on all nodes",
            "put --run-dir on a shared filesystem",
        )
    if nodes > 1 and kind in _NO_ATOMIC_APPEND:
        yield Finding(
            subject,
            Level.WARN,
            f"on {kind} two nodes that append at once may overwrite each other's events",
            "put --run-dir on a parallel filesystem if there is one",
        )


def interface(step: Step | None, environ: Mapping[str, str]) -> Finding:
    """Which network the ranks would use."""
    peer = step.launcher if step else _other_node(environ)
    if peer is None:
        return Finding("network", Level.OK, "one machine: shared memory and loopback")
    try:
        address = address_towards(peer)
    except OSError as error:
        return Finding(
            "network", Level.FAIL, f"no way to {peer}: {error.strerror}", "check the network"
        )
    network = network_of(address)
    if network is None:
        return Finding(
            "network",
            Level.WARN,
            f"{address} leads to the other nodes, but belongs to no interface with a netmask",
            "choose one yourself: export OMPI_MCA_btl_tcp_if_include=NETWORK/BITS",
        )
    return Finding("network", Level.OK, f"{network}, by which this node reaches {peer} ({address})")


def slurm(step: Step | None, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What Slurm has been built with and asked for."""
    if not shutil.which("srun"):
        if "SLURM_JOB_ID" in environ:
            yield Finding("Slurm", Level.FAIL, "a job, but no srun on PATH", "add it to PATH")
        return
    if step is None:
        # `srun --mpi=list` asks nothing of the controller.
        plugins = printed("srun", "--mpi=list", complaints=True)
        if re.search(r"^\s*(\S+: )?pmix", plugins, re.MULTILINE):
            yield Finding("Slurm", Level.OK, "srun has PMIx")
        elif "SLURM_JOB_ID" in environ or "plugin" in plugins:
            yield Finding(
                "Slurm",
                Level.FAIL,
                "srun has no PMIx (see srun --mpi=list), so it cannot start ranks",
                "ask the site for Slurm's PMIx plugin, or train on one node",
            )
        else:
            # Installed and not set up: of no interest unless the user thinks otherwise.
            said = (plugins.strip().splitlines() or ["nothing"])[-1]
            yield Finding(
                "Slurm",
                Level.WARN,
                f"not usable on this machine; srun says: {said}",
                "none is needed, unless this machine should belong to a cluster",
            )
        return
    if not step.pmix:
        yield Finding(
            "srun", Level.FAIL, "the step was started without PMIx", "use srun --mpi=pmix"
        )
    options = srun.options_of(step)
    if options is None:
        config = scontrol.configuration()
        # All of them but --no-kill are off unless the site has turned them on.
        yield Finding(
            "srun",
            Level.OK,
            f"its options cannot be seen from this node; needed are {SRUN_OPTIONS} (here "
            f"KillOnBadExit is {config.get('KillOnBadExit', 'unknown')}, "
            f"WaitTime {config.get('WaitTime', 'unknown')})",
        )
        return
    missing = srun.problems(options)
    for problem in missing:
        yield Finding("srun", Level.WARN, problem, f"use srun {SRUN_OPTIONS}")
    if not missing:
        yield Finding("srun", Level.OK, "its options let the step survive")


def try_killed_rank(mpi: openmpi.OpenMPI, environ: Mapping[str, str]) -> Finding:
    """Start three ranks with mpiexec, have one killed, see whether the others go on."""
    subject = "killed rank"
    # In a Slurm step mpiexec would take itself for a part of it, and start the ranks by srun.
    clean = {
        name: value
        for name, value in environ.items()
        if not name.startswith(("SLURM_", "PMIX_", "PMI_", "PRTE_"))
    }
    with scratch() as folder:
        command = [*openmpi.command(mpi.mpiexec, 3, folder), "--host", "localhost:3"]
        clean |= rank_settings(mpi.prefix, 3, None, folder)
        code, output = _try([*command, sys.executable, "-m", "hpcft.world.trial"], clean)
    survived = re.search(r"survived 2 of 3 in ([\d.]+) s", output)
    if survived and code == 0:
        milliseconds = 1000 * float(survived[1])
        return Finding(
            subject, Level.OK, f"tried: 2 of 3 ranks went on after {milliseconds:.0f} ms"
        )
    return Finding(
        subject,
        Level.FAIL,
        f"tried with 3 ranks of which one was killed: {_short(code, output)}",
        "look for settings in OMPI_MCA_* variables or ~/.openmpi that stand in the way, or use the "
        "Open MPI of: pip install 'hpcft[openmpi]'",
    )


def try_killed_rank_in_step(run_dir: Path, nodes: int) -> Finding:
    """In an allocation: run the shortest training there is on all nodes, with a rank killed."""
    subject = "training"
    place = run_dir.absolute() / "hpcft-doctor"
    command = ["srun", *SRUN_OPTIONS.split(), f"--nodes={nodes}", "--ntasks-per-node=1"]
    command += [sys.executable, "-m", "hpcft.run", "--run-dir", str(place), "--spares", "1"]
    command += ["--verbose", "0", "-m", "hpcft.train.trial"]
    code, output = _try(command, os.environ)
    try:
        summary = json.loads((place / "summary.json").read_text())
    except (OSError, ValueError):
        summary = {}
    failures = summary.get("failures", [])
    if code == 0 and summary.get("result") == "ok" and len(failures) == 1:
        shutil.rmtree(place, ignore_errors=True)
        stall = failures[0]["stall_s"]
        return Finding(
            subject,
            Level.OK,
            f"tried on {nodes} nodes: a rank was killed, the spare took over"
            + (f" after {1000 * stall:.0f} ms" if stall is not None else ""),
        )
    return Finding(
        subject,
        Level.FAIL,
        f"tried on {nodes} nodes, with a rank killed: {_short(code, output)}",
        f"see {place}/logs",
    )


def _failure(subject: str, error: HpcftError) -> Finding:
    return Finding(subject, Level.FAIL, error.message, error.remedy)


def _nodes(environ: Mapping[str, str]) -> int:
    return int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_JOB_NUM_NODES", "1")))


def _other_node(environ: Mapping[str, str]) -> str | None:
    """Some node of the allocation that is not this one."""
    if _nodes(environ) == 1:
        return None
    nodes = printed("scontrol", "show", "hostnames", environ.get("SLURM_JOB_NODELIST", ""))
    return next((node for node in nodes.split() if node != host_name()), None)


def _filesystem(path: Path) -> str:
    """Type of the filesystem that ``path`` is on, as in ``ext4``."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    resolved = path.resolve()
    kind, longest = "unknown filesystem", -1
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        fields = line.split(" ")
        # A space in a path is written \040 there.
        mount = Path(fields[4].encode().decode("unicode_escape"))
        after = fields[fields.index("-") + 1 :]
        # btrfs and overlay give files other device numbers than the mount's; the path decides.
        better = len(mount.parts) + (1000 if fields[2] == wanted else 0)
        if resolved.is_relative_to(mount) and better >= longest:
            kind, longest = after[0], better
    return kind


def _file_troubles(folder: Path) -> str:
    """What does not work in ``folder`` of what a run directory needs; empty if all does."""
    log = folder / "append"
    writers = [os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for _ in range(2)]
    try:
        for _ in range(50):
            for number, writer in enumerate(writers):
                os.write(writer, b"%d" % number * 80 + b"\n")
    finally:
        for writer in writers:
            os.close(writer)
    if log.read_bytes() != (b"0" * 80 + b"\n" + b"1" * 80 + b"\n") * 50:
        return "two writers that append to one file overwrite each other"
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    with new.open("w") as file:
        file.write("new")
        file.flush()
        os.fsync(file.fileno())
    new.replace(old)
    if old.read_text() != "new" or new.exists():
        return "a file cannot be replaced by renaming another"
    return ""


def _try(command: list[str], environ: Mapping[str, str]) -> tuple[int | None, str]:
    """Run a trial; exit code (None: it hung and was killed) and output."""
    with tempfile.TemporaryFile() as out:
        try:
            process = subprocess.Popen(
                command,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        code: int | None
        try:
            code = process.wait(_TRIAL_SECONDS)
        except BaseException as error:
            # Asked first, so that mpiexec and srun take their ranks with them.
            _end(process, lambda: os.killpg(process.pid, signal.SIGTERM))
            _end(process, lambda: os.killpg(process.pid, signal.SIGKILL))
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
        out.seek(0)
        return code, out.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes], kill: Callable[[], None]) -> None:
    try:
        kill()
        process.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def _short(code: int | None, output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip(" -")]
    ended = "it hung" if code is None else f"exit code {code}"
    return f"{ended}; {' / '.join(lines[-3:])}" if lines else ended


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _size(number: int) -> str:
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def host_name() -> str:
    """What to call this machine in a report."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
