"""Open MPI's daemons on the nodes of other Slurm jobs, started by the shepherds that are there.

srun starts tasks in one job, and mpiexec starts its daemons by ssh, which clusters may not permit.
But there is a shepherd on each node already. So mpiexec is given a remote shell of ours
(:mod:`hpcft.launch.agent`); it passes the command to the shepherd that has started mpiexec, that
announces it, and the node's shepherd starts it. A fact of the channel (see
:mod:`hpcft.launch.fleet`)::

    daemon N   a shepherd: it is to start this command for launch N
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from hpcft.launch import agent
from hpcft.launch.channel import of_this_user
from hpcft.launch.company import Company


class Daemons:
    """One launch's, in the shepherd that starts mpiexec.

    Parameters
    ----------
    company: the shepherds.
    number: of the launch.
    hosts: where those are that are to be of it, by rank.
    folder: for files of this process.
    """

    def __init__(
        self, company: Company, number: int, hosts: Mapping[int, str], folder: Path
    ) -> None:
        self._company = company
        self._number = number
        self._hosts = hosts
        self._folder = folder

    async def listen(self) -> str:
        """Be there for mpiexec.

        Returns
        -------
        The command that is to be its remote shell.

        Raises
        ------
        OSError: the script cannot be written.
        """
        name = f"hpcft-{secrets.token_hex(12)}"
        self._server = await asyncio.start_unix_server(self._asked, "\0" + name)
        script = self._folder / f"agent-{self._number}"
        command = shlex.join([sys.executable, "-ISE", agent.__file__, name])
        script.write_text(f'exec {command} "$@"\n')
        # Open MPI takes it apart at spaces; and files in memory may not be executable.
        return f"/bin/sh {script}"

    def close(self) -> None:
        """mpiexec needs no more."""
        self._server.close()

    async def _asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):
            if of_this_user(writer.get_extra_info("socket")):
                asked = json.loads(await reader.readline())
                rank = min(rank for rank, host in self._hosts.items() if host == asked["host"])
                # What is in this process's folder is to be in that one's.
                self._company.announce(
                    f"daemon {self._number}",
                    rank,
                    command=asked["command"],
                    folder=str(self._folder),
                )
                writer.write(b"+")
        writer.close()


def start(company: Company, number: int, folder: Path) -> subprocess.Popen[bytes] | None:
    """Start the daemon that this shepherd is to start.

    Parameters
    ----------
    number: of the launch.
    folder: for the daemon's files.

    Returns
    -------
    None if it is not to start one, as far as is known.
    """
    asked = company.said(f"daemon {number}").get(company.rank)
    if asked is None:
        return None
    return subprocess.Popen(
        ["/bin/sh", "-c", asked["command"].replace(asked["folder"], str(folder))],
        env=without_mpi(os.environ),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def without_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for what starts MPI processes, of one that is or was a process of MPI's."""
    strange = ("PMIX_", "PRTE_", "OMPI_COMM")
    return {name: value for name, value in environ.items() if not name.startswith(strange)}
