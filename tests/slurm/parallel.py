"""A real parallel file system on the lab's nodes: GlusterFS, every file on three servers.

n1 to n3 serve it, each from a directory of its own; all nodes mount it at the same place, each with
a client and a page cache of its own, and so does the machine that the tests run on. Needs what the
lab needs, FUSE, and from Debian: glusterfs-server, glusterfs-client.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
from cluster import _FREEZER, HOME, Cluster, LabError, _path, _run, _wait

#: Where it is mounted.
MOUNT = Path("/run/hpcft-lab-pfs")
VOLUME = "ckpt"


def missing() -> str:
    """Why there can be none here, or an empty string."""
    if not Path("/dev/fuse").exists():
        return "needs FUSE"
    absent = [tool for tool in ("glusterd", "glusterfs", "gluster") if not shutil.which(tool)]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: glusterfs-server glusterfs-client)"
    return ""


class ParallelFileSystem:
    """The file system of a lab that is up.

    Parameters
    ----------
    cluster: the lab; it has three nodes or more.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.servers = cluster.nodes[:3]

    # -- up and down ---------------------------------------------------------------------------

    def up(self) -> None:
        """Make the file system, empty, and mount it everywhere."""
        if reason := missing():
            raise LabError(reason)
        self.down()
        MOUNT.mkdir()
        first, *others = self.servers
        for node in self.servers:
            self._start_glusterd(node)
        for node in self.servers:
            _wait(f"glusterd on {node}", lambda node=node: self._knows(node, "Number of Peers"))
        for node in others:
            self._gluster("peer", "probe", node)
        # What one server knows of another, the other learns a moment later.
        for node in self.servers:
            _wait("the servers to meet", lambda node=node: self._met(node))
        bricks = [f"{node}:{self._home(node)}/brick" for node in self.servers]
        self._gluster("volume", "create", VOLUME, "replica", str(len(bricks)), *bricks, "force")
        # So long clients wait for a server that is silent; one that has ended they notice at once.
        self._gluster("volume", "set", VOLUME, "network.ping-timeout", "600")
        self._gluster("volume", "start", VOLUME)
        for node in self._cluster.nodes:
            self._run(node, *self._client(first, self._home(node)))
        home = HOME / "gluster"
        home.mkdir(exist_ok=True)
        _run(*self._client(first, home))
        self.revive()

    def down(self) -> None:
        """Take it down, whatever state it is in; what was in it is gone."""
        for pid in [*self._processes(), *self._clients()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _wait("the servers to end", lambda: not self._processes())
        for node in self._cluster.nodes:
            for place in (MOUNT, "/var/lib/glusterd", "/var/log/glusterfs", "/run/gluster"):
                self._run(node, "umount", "--lazy", str(place), check=False)
            shutil.rmtree(self._home(node), ignore_errors=True)
        _run("umount", "--lazy", str(MOUNT), check=False)
        if MOUNT.exists():
            MOUNT.rmdir()

    def _home(self, node: str) -> Path:
        return HOME / node / "gluster"

    def _start_glusterd(self, node: str) -> None:
        home = self._home(node)
        binds = ""
        for name, place in (
            ("lib", "lib/glusterd"),
            ("log", "log/glusterfs"),
            ("run", "run/gluster"),
        ):
            (home / name).mkdir(parents=True)
            binds += f"mkdir -p /var/{place} && mount --bind {home}/{name} /var/{place} && "
        (home / "brick").mkdir()
        with (home / "glusterd.out").open("wb") as out:
            subprocess.Popen(
                self._inside(
                    node,
                    "sh",
                    "-c",
                    f"{binds} exec glusterd --no-daemon --pid-file={home}/glusterd.pid "
                    f"--xlator-option management.glusterd-sockfile={home}/glusterd.sock",
                ),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, "PATH": _path()},
            )

    def _client(self, server: str, home: Path) -> list[str]:
        home.mkdir(parents=True, exist_ok=True)
        return [
            "glusterfs",
            f"--volfile-server={server}",
            f"--volfile-id={VOLUME}",
            f"--log-file={home}/client.log",
            str(MOUNT),
        ]

    def _inside(self, node: str, *words: str) -> list[str]:
        """``words``, to be run on a node, where its jobs are run."""
        slurmd = self._named(node, "slurmd")[0]
        tasks = _FREEZER / f"hpcft-lab-{node}" / "tasks"
        enter = ["nsenter", f"--target={slurmd}", "--mount", "--net", "--uts", "--"]
        return [*enter, "sh", "-c", f'echo $$ > {tasks}; exec "$@"', "sh", *words]

    def _run(self, node: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return _run(*self._inside(node, *words), check=check)

    def _gluster(self, *words: str, node: str = "") -> str:
        node = node or self.servers[0]
        socket = f"--glusterd-sock={self._home(node)}/glusterd.sock"
        return self._run(node, "gluster", socket, "--mode=script", *words).stdout

    def _knows(self, node: str, text: str) -> bool:
        with contextlib.suppress(LabError):
            return text in self._gluster("peer", "status", node=node)
        return False

    def _met(self, node: str) -> bool:
        status = self._gluster("peer", "status", node=node)
        return status.count("Peer in Cluster (Connected)") == len(self.servers) - 1

    # -- processes -----------------------------------------------------------------------------

    def _named(self, node: str, name: str) -> list[int]:
        found = []
        for pid in self._cluster.processes(node):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    found.append(pid)
        return found

    def _processes(self) -> list[int]:
        """Servers and clients on the nodes."""
        nodes, names = self._cluster.nodes, ("glusterd", "glusterfsd", "glusterfs")
        return [pid for node in nodes for name in names for pid in self._named(node, name)]

    def _clients(self) -> list[int]:
        """The processes behind the mounts, on the nodes and here."""
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if words[0] == b"glusterfs" and os.fsencode(MOUNT) in words:
                    found.append(int(name))
        return found

    # -- harm ----------------------------------------------------------------------------------

    def kill_server(self, *nodes: str) -> None:
        """SIGKILL to the servers on these nodes; the nodes live on."""
        servers = [pid for node in nodes for pid in self._named(node, "glusterfsd")]
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
        # Not only dead: glusterd starts none anew as long as there is a process of the id.
        for pid in servers:
            _wait(f"server {pid} to be gone", lambda pid=pid: not psutil.pid_exists(pid))

    def hang(self) -> None:
        """No server answers any more: who calls the file system waits in the kernel."""
        for node in self.servers:
            for pid in self._named(node, "glusterfsd"):
                os.kill(pid, signal.SIGSTOP)

    def revive(self) -> None:
        """Undo all harm, and wait until every client has all servers again."""
        for node in self.servers:
            for pid in self._named(node, "glusterfsd"):
                os.kill(pid, signal.SIGCONT)
        self._gluster("volume", "start", VOLUME, "force")
        # Every node's client, our own, and every server's daemon that heals.
        wanted = len(self.servers) * (len(self._cluster.nodes) + 1 + len(self.servers))
        _wait("all clients to be back", lambda: self._connections() >= wanted)

    def _connections(self) -> int:
        """How many connections the servers have."""
        try:
            text = self._gluster("volume", "status", VOLUME, "clients")
        except LabError:  # a server that is just starting cannot say
            return 0
        return sum(int(n) for n in re.findall(r"Clients connected : (\d+)", text))
