"""The ``hpcft`` command."""

from __future__ import annotations

import argparse
import signal
import sys
from types import ModuleType

from hpcft import __version__, run
from hpcft.cli import (
    chaos,
    ckpt,
    doctor,
    join,
    leave,
    logs,
    metrics,
    plan,
    ps,
    report,
    risk,
    sbatch,
    stop,
    top,
    upload,
)
from hpcft.errors import HpcftError

_DESCRIPTION = "PyTorch training on MPI that survives the loss of ranks and nodes in place."

_EPILOG = """\
to begin with:
    hpcft doctor                                        does it work on this machine?
    hpcft run --nproc 4 --spares 1 train.py             train here
    srun --mpi=pmix --kill-on-bad-exit=0 --no-kill --wait=0 -N4 \\
        hpcft run --spares 1 train.py                   train in a Slurm allocation
    hpcft sbatch --nodes 4 --time 4:00:00 train.py      write a batch script for this cluster
    hpcft ps                                            what runs, and how far it is
    hpcft report RUN                                    what it was, and where its time went
    hpcft plan --nodes 512 --days 30                    what a campaign would come to
"""


_COMMANDS: dict[str, ModuleType] = {
    "doctor": doctor,
    "sbatch": sbatch,
    "ps": ps,
    "top": top,
    "logs": logs,
    "report": report,
    "metrics": metrics,
    "upload": upload,
    "join": join,
    "leave": leave,
    "stop": stop,
    "chaos": chaos,
    "ckpt": ckpt,
    "plan": plan,
    "risk": risk,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's) and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:
        # Has a parser of its own, for `python -m hpcft.run` is the same command.
        return run.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="hpcft",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hpcft {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    commands.add_parser("run", help="start a training whose ranks may die", add_help=False)
    for name, command in _COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=getattr(command, "DESCRIPTION", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except HpcftError as error:
        print(f"hpcft: {error.line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("hpcft: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
