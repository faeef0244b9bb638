"""A real Slurm cluster on one machine.

Each node has a network, a UTS and a mount namespace of its own, with its own /tmp and /dev/shm, and
a slurmd; slurmctld and munged run beside them. A bridge joins the nodes; cutting a node's link
takes its interface down, so that nothing is told to the other side. Needs root, and from Debian:
slurmctld, slurmd, slurm-client, munge, iproute2.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

#: srun and the options that let a step survive the loss of tasks and nodes.
SRUN = ["srun", "--mpi=pmix", "--kill-on-bad-exit=0", "--no-kill", "--wait=0"]
HOME = Path("/run/hpcft-lab")
BRIDGE = "hpcftlab"
NETWORK = "10.77.0"
CONTROLLER = "hpcft-ctl"
_HOSTS_MARK = "# hpcft-lab"
_CPUS = 16
#: Nothing but names, so that jobs can ask for them.
_GPUS = 2
_GPU_NODES = ("n3", "n4")
_FREEZER = Path("/sys/fs/cgroup/freezer")

_CONFIGURATION = """\
ClusterName=hpcftlab
SlurmctldHost={controller}({network}.254)
SlurmctldPort=7817
SlurmdPort=7818
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits for as long as a credential is good.
AuthInfo=socket={home}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/%n/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=15
SlurmdTimeout=5
TCPTimeout=5
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MessageTimeout=20
{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP OverSubscribe=NO MaxTime=INFINITE PriorityTier=10
PartitionName=main Default=YES PreemptMode=OFF
PartitionName=low PriorityTier=1 GraceTime=20 PreemptMode=CANCEL MaxTime=02:00:00 MaxNodes=3
"""


class LabError(Exception):
    """The lab cannot do what was asked; says why."""


def missing() -> str:
    """Why the lab cannot be brought up here, or an empty string."""
    if os.geteuid() != 0:
        return "needs root"
    tools = ["slurmctld", "slurmd", "srun", "munged", "ip", "nsenter", "unshare"]
    absent = [tool for tool in tools if not shutil.which(tool, path=_path())]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd munge iproute2)"
    return ""


def _forget_hosts(hosts: Path) -> None:
    """Take the nodes out of the machine's hosts, of which nothing else is to be lost."""
    lines = hosts.read_text().splitlines()
    kept = "".join(f"{line}\n" for line in lines if _HOSTS_MARK not in line)
    aside = hosts.with_name(".hosts.hpcft-lab")
    aside.write_text(kept)
    shutil.copymode(hosts, aside)
    try:
        aside.replace(hosts)
    except OSError:  # a mount, as in a container
        hosts.write_text(kept)
        aside.unlink()


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": _path()}, check=False
    )
    if check and done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done


def _wait(what: str, condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.05)


class Cluster:
    """The lab. There is at most one on a machine; every instance speaks to that one.

    Parameters
    ----------
    nodes: how many nodes :meth:`up` makes; named n1, n2, ...
    """

    def __init__(self, nodes: int = 4) -> None:
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]

    # -- up and down ---------------------------------------------------------------------------

    def up(self) -> None:
        """Bring the lab up; does nothing if it is."""
        if reason := missing():
            raise LabError(reason)
        if self.is_up():
            return
        self.down()
        HOME.mkdir(mode=0o755)
        (HOME / "state").mkdir()
        self._start_munge()
        self._make_network()
        self._write_configuration()
        self._start_controller()
        for node in self.nodes:
            self._start_slurmd(node)
        _wait("all nodes to be idle", lambda: self.states() == dict.fromkeys(self.nodes, "idle"))

    def is_up(self) -> bool:
        """Whether slurmctld answers and all nodes can be used."""
        return self.conf.exists() and self.states() == dict.fromkeys(self.nodes, "idle")

    def down(self) -> None:
        """Take the lab down, whatever state it is in. Leaves nothing behind."""
        for group in _FREEZER.glob("hpcft-lab-*"):
            (group / "freezer.state").write_text("THAWED")
        for _ in range(50):
            pids = [pid for node in self._known_nodes() for pid in self.processes(node)]
            pids += self._daemons()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not pids:
                break
            time.sleep(0.1)
        for group in _FREEZER.glob("hpcft-lab-*"):
            with contextlib.suppress(OSError):
                group.rmdir()
        for node in self._known_nodes():
            # By itself the link goes only some time after its namespace.
            _run("ip", "link", "del", f"hl-{node}", check=False)
            _run("ip", "netns", "del", f"hpcft-{node}", check=False)
        _run("ip", "link", "del", BRIDGE, check=False)
        _forget_hosts(Path("/etc/hosts"))
        shutil.rmtree(HOME, ignore_errors=True)

    def _known_nodes(self) -> list[str]:
        names = Path("/run/netns").glob("hpcft-n*") if Path("/run/netns").exists() else []
        return [path.name.removeprefix("hpcft-") for path in names]

    def _daemons(self) -> list[int]:
        """Process numbers of slurmctld, munged and their like, known by the lab's directory."""
        found = []
        for pid in _pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if any(str(HOME).encode() in word for word in words) and pid != os.getpid():
                    found.append(pid)
        return found

    def _start_munge(self) -> None:
        key = HOME / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            [
                "munged",
                "--foreground",
                "--force",
                f"--socket={HOME}/munge.socket",
                f"--key-file={key}",
                f"--log-file={HOME}/munged.log",
                f"--pid-file={HOME}/munged.pid",
                f"--seed-file={HOME}/munged.seed",
            ],
            HOME / "munged.out",
        )
        _wait("munged", (HOME / "munge.socket").exists)

    def _make_network(self) -> None:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        names = [f"{NETWORK}.254 {CONTROLLER} {_HOSTS_MARK}"]
        for number, node in enumerate(self.nodes, 1):
            space = f"hpcft-{node}"
            _run("ip", "netns", "add", space)
            _run(
                "ip",
                "link",
                "add",
                f"hl-{node}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            _run("ip", "link", "set", f"hl-{node}", "master", BRIDGE, "up")
            inside = ["ip", "-n", space]
            _run(*inside, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            _run(*inside, "link", "set", "eth0", "up")
            _run(*inside, "link", "set", "lo", "up")
            names.append(f"{NETWORK}.{number} {node} {_HOSTS_MARK}")
        with Path("/etc/hosts").open("a") as hosts:
            hosts.write("\n".join(names) + "\n")

    def _write_configuration(self) -> None:
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={NETWORK}.{number} CPUs={_CPUS} RealMemory=4000"
            + (f" Gres=gpu:{_GPUS}" if node in _GPU_NODES else "")
            for number, node in enumerate(self.nodes, 1)
        )
        for number in range(_GPUS):
            # As good as /dev/null; Slurm wants a device.
            os.mknod(HOME / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        where = f"NodeName={','.join(_GPU_NODES)} Name=gpu File={HOME}/gpu[0-{_GPUS - 1}]"
        gres = f"AutoDetect=off\n{where}\n"
        (HOME / "gres.conf").write_text(gres)
        self.conf.write_text(
            _CONFIGURATION.format(controller=CONTROLLER, network=NETWORK, home=HOME, nodes=nodes)
        )

    def _start_controller(self) -> None:
        inside = f"hostname {CONTROLLER}; exec slurmctld -D -f {self.conf}"
        self._daemon(["unshare", "--uts", "sh", "-c", inside], HOME / "slurmctld.out")

    def _start_slurmd(self, node: str) -> None:
        home = HOME / node
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        (home / "spool").mkdir(exist_ok=True)
        # With what PMIx of a slurmstepd that was killed leaves behind Slurm 22.05 cannot start a
        # step of the same number, as that of a job which is requeued, on this node again.
        for left in [*(home / "spool").glob("*pmix.*"), *(home / "tmp").glob("spmix_*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        group = _FREEZER / f"hpcft-lab-{node}"
        group.mkdir(exist_ok=True)
        # The nodes share what the tests run, even if it is in /tmp.
        shared = {
            path: home / path.relative_to("/")
            for path in (Path(__file__).parents[2].resolve(), Path(sys.prefix).resolve())
            if path.is_relative_to("/tmp")
        }
        for there in shared.values():
            there.mkdir(parents=True, exist_ok=True)
        binds = "".join(f"mount --bind {path} {there} && " for path, there in shared.items())
        inside = (
            f"echo $$ > {group}/tasks && hostname {node} && {binds}"
            f"mount --rbind {home}/tmp /tmp && mount -t tmpfs lab /dev/shm && "
            f"exec slurmd -D -N {node} -f {self.conf}"
        )
        self._daemon(
            [
                "nsenter",
                f"--net=/run/netns/hpcft-{node}",
                "unshare",
                "--uts",
                "--mount",
                "sh",
                "-c",
                inside,
            ],
            home / "slurmd.out",
        )

    def _daemon(self, command: list[str], log: Path) -> None:
        with log.open("ab") as out:
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PATH": _path(), "SLURM_CONF": str(self.conf)},
            )

    # -- use -----------------------------------------------------------------------------------

    @property
    def conf(self) -> Path:
        return HOME / "slurm.conf"

    def environ(self) -> dict[str, str]:
        """Environment in which Slurm's commands speak to the lab."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMIX_", "OMPI_"))
        }
        return {**kept, "PATH": _path(), "SLURM_CONF": str(self.conf)}

    def command(self, words: Sequence[str]) -> list[str]:
        """``words``, to be run as on the controller."""
        return ["unshare", "--uts", "sh", "-c", f'hostname {CONTROLLER}; exec "$@"', "sh", *words]

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command as on the controller and return its result."""
        return subprocess.run(
            self.command(words),
            capture_output=True,
            text=True,
            env=self.environ(),
            timeout=timeout,
            check=False,
        )

    def start(self, *words: str, **how: object) -> subprocess.Popen[str]:
        """Start a command as on the controller."""
        return subprocess.Popen(
            self.command(words),
            text=True,
            env=self.environ(),
            **how,  # type: ignore[call-overload]
        )

    def batch(self, *words: str) -> str:
        """Run a batch job to its end, and return how Slurm says it ended.

        ``sbatch --wait`` looks seldom, and ever more seldom.
        """
        done = self.run("sbatch", "--parsable", *words)
        if done.returncode:
            raise LabError(done.stderr)
        job = done.stdout.strip()
        ended = re.compile(r"JobState=(COMPLETED|FAILED|CANCELLED|NODE_FAIL|TIMEOUT)")

        def state() -> str:
            found = ended.search(self.run("scontrol", "show", "job", job).stdout)
            return found[1] if found else ""

        _wait(f"job {job}", lambda: bool(state()), 120)
        return state()

    def states(self) -> dict[str, str]:
        """State of every node, as sinfo has it."""
        done = self.run("sinfo", "-h", "-N", "-o", "%N %T")
        return dict(line.split() for line in done.stdout.splitlines() if line)

    # -- harm ----------------------------------------------------------------------------------

    def processes(self, node: str) -> list[int]:
        """Process numbers of all that runs on a node."""
        try:
            space = Path(f"/run/netns/hpcft-{node}").stat().st_ino
        except OSError:
            return []
        return [pid for pid in _pids() if _netns(pid) == space]

    def slurmd(self, node: str) -> int:
        """The process that takes Slurm's orders there."""
        return next(pid for pid in self.processes(node) if _name(pid) == "slurmd")

    def kill_node(self, node: str) -> None:
        """The node is gone at once: every process on it gets SIGKILL."""
        self.freeze(node)
        for pid in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.thaw(node)
        _wait(f"{node} to be dead", lambda: not self.processes(node))

    def kill_controller(self) -> None:
        """slurmctld is gone; what it knew is in its files."""
        for pid in self._daemons():
            if _name(pid) == "slurmctld":
                os.kill(pid, signal.SIGKILL)

    def start_controller(self) -> None:
        """It comes back."""
        self._start_controller()
        _wait("the controller", lambda: bool(self.states()))

    def drain(self, node: str) -> None:
        """Let no other job begin on a node."""
        self._update(node, "DRAIN")

    def undrain(self, node: str) -> None:
        """Undo that."""
        self._update(node, "RESUME")

    def write_off(self, node: str) -> None:
        """Tell Slurm that a node is lost, which it would find out half a minute later."""
        self._update(node, "DOWN")

    def _update(self, node: str, state: str) -> None:
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=lab")

    def revive_nodes(self) -> None:
        """Undo all harm to nodes."""
        for node in self.nodes:
            self.thaw(node)
            self.heal(node)
            if not any(_name(pid) == "slurmd" for pid in self.processes(node)):
                self._start_slurmd(node)

    def revive(self) -> None:
        """The same, and wait until Slurm has all nodes again."""
        self.revive_nodes()
        deadline = time.monotonic() + 60
        gentle = time.monotonic() + 3
        while busy := [node for node, state in self.states().items() if state != "idle"]:
            if time.monotonic() > deadline:
                raise LabError(f"nodes do not come back: {self.states()}")
            if time.monotonic() > gentle:
                # Slurm can be minutes in asking a node again about a job that ended when it was
                # away. Down and up clears that.
                for node in busy:
                    self._update(node, "DOWN")
                    self._update(node, "RESUME")
            time.sleep(0.2)

    def cut(self, node: str) -> None:
        """Take the node's link down. Nobody is told."""
        _run("ip", "link", "set", f"hl-{node}", "down")

    def heal(self, node: str) -> None:
        """Bring the link up again."""
        _run("ip", "link", "set", f"hl-{node}", "up")

    def freeze(self, node: str) -> None:
        """Stop everything on the node, without anybody's knowing."""
        group = _FREEZER / f"hpcft-lab-{node}"
        (group / "freezer.state").write_text("FROZEN")
        _wait(f"{node} to freeze", lambda: "FROZEN" in (group / "freezer.state").read_text())

    def thaw(self, node: str) -> None:
        """Let it go on."""
        (_FREEZER / f"hpcft-lab-{node}" / "freezer.state").write_text("THAWED")


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _netns(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


_USAGE = """\
A real Slurm cluster of four nodes on this machine, for trying things out.

  tests/slurm/lab up             bring it up (about 4 s)
  tests/slurm/lab shell          a shell in which srun and sbatch speak to it
  tests/slurm/lab run CMD...     run one command there: lab run srun -N4 hostname
  tests/slurm/lab kill NODE      kill everything on a node
  tests/slurm/lab cut NODE       take a node's link down;    heal NODE    bring it up
  tests/slurm/lab freeze NODE    stop everything on a node;  thaw NODE    let it go on
  tests/slurm/lab revive         undo all of these
  tests/slurm/lab status         the nodes' states
  tests/slurm/lab down           take it down; leaves nothing behind

A node has a /tmp and a /dev/shm of its own; everything else of the file system is shared.
"""


def main(words: list[str]) -> int:
    """The ``lab`` command."""
    cluster = Cluster()
    harm = {
        "kill": cluster.kill_node,
        "cut": cluster.cut,
        "heal": cluster.heal,
        "freeze": cluster.freeze,
        "thaw": cluster.thaw,
    }
    try:
        match words:
            case ["up"]:
                cluster.up()
                print("the lab is up: try `tests/slurm/lab run srun -N4 hostname`")
            case ["down"]:
                cluster.down()
            case ["revive"]:
                cluster.revive()
            case ["status"]:
                for node, state in cluster.states().items():
                    print(f"{node}  {state}  {len(cluster.processes(node))} processes")
            case ["shell"]:
                shell = os.environ.get("SHELL", "bash")
                return subprocess.call(cluster.command([shell]), env=cluster.environ())
            case ["run", *command] if command:
                return subprocess.call(cluster.command(command), env=cluster.environ())
            case [action, node] if action in harm and node in cluster.nodes:
                harm[action](node)
            case _:
                print(_USAGE, end="")
                return 0 if words in (["-h"], ["--help"]) else 2
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
