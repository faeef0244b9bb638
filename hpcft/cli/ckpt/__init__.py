"""``hpcft ckpt``: look after checkpoints. A module a sub-command."""

from __future__ import annotations

import argparse

from hpcft.cli.ckpt import diff, export, import_, ls, prune, show, top, verify
from hpcft.errors import HpcftError

SUMMARY = "list, show, verify, compare, prune, convert and watch checkpoints"

_DESCRIPTION = """\
Look after the checkpoints that `hpcft run --ckpt-dir DIR` has saved.

    hpcft ckpt ls DIR                      what is there
    hpcft ckpt top DIR                     what is being written, live
    hpcft ckpt show DIR                    the leaves of the newest: path, type, shape, size
    hpcft ckpt verify DIR                  read all of them and check every checksum
    hpcft ckpt diff OLD NEW                which leaves differ
    hpcft ckpt prune DIR --keep 2          remove all but the newest two
    hpcft ckpt export DIR model.safetensors --format safetensors
    hpcft ckpt export DIR dcp --format dcp      write the newest in another format
    hpcft ckpt import SOURCE DIR           commit a file of another format as a checkpoint

Wherever a checkpoint is wanted, its directory (DIR/step-...), its file, or DIR, for the newest in
it, will do. Its file state.h5 is standard HDF5: h5ls, h5dump and h5py read it as well. Where each
rank has written a file of its own (--ckpt-layout), these have to lie beside it.
"""

_COMMANDS = {
    "ls": ls,
    "top": top,
    "show": show,
    "verify": verify,
    "diff": diff,
    "prune": prune,
    "export": export,
    "import": import_,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the sub-commands."""
    parser.description = _DESCRIPTION
    parser.epilog = "exit code: 0 if all is well, 1 if something is damaged or differs, 2 wrong use"
    commands = parser.add_subparsers(metavar="COMMAND", dest="action", required=True)
    for name, command in _COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=getattr(command, "DESCRIPTION", command.SUMMARY),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.add_argument("--json", action="store_true", help="print JSON, a line an item")
        command.add_arguments(own)
        own.set_defaults(act=command.run)


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    try:
        code: int = args.act(args)
    except OSError as error:
        raise HpcftError(str(error)) from error
    return code
