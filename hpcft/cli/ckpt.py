"""``hpcft ckpt``: look at checkpoints, verify, compare and prune them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from hpcft.errors import HpcftError, UsageError

SUMMARY = "list, show, verify, compare and prune checkpoints"

_DESCRIPTION = """\
Look after the checkpoints that `hpcft run --ckpt-dir DIR` has saved.

    hpcft ckpt ls DIR                 what is there
    hpcft ckpt show DIR               the leaves of the newest: path, type, shape, size
    hpcft ckpt verify DIR             read all of them and check every checksum
    hpcft ckpt diff OLD NEW           which leaves differ
    hpcft ckpt prune DIR --keep 2     remove all but the newest two

Wherever a checkpoint is wanted, its directory (DIR/step-...), its file, or DIR, for the newest in
it, will do. The file is standard HDF5: h5ls, h5dump and h5py read it as well.
"""

#: Enough to keep a disk busy.
_MEMORY = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the sub-commands."""
    parser.description = _DESCRIPTION
    parser.epilog = "exit code: 0 if all is well, 1 if something is damaged or differs, 2 wrong use"
    commands = parser.add_subparsers(metavar="COMMAND", dest="action", required=True)

    def add(name: str, action: Callable[[argparse.Namespace], int], says: str) -> Any:
        command = commands.add_parser(name, help=says, description=says)
        command.add_argument("--json", action="store_true", help="print JSON, a line an item")
        command.set_defaults(act=action)
        return command

    listing = add("ls", _ls, "list the checkpoints in a directory")
    listing.add_argument("directory", type=Path, metavar="DIR")
    show = add("show", _show, "show what a checkpoint holds")
    show.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    show.add_argument("--under", default="/", metavar="PATH", help="only leaves below this path")
    verify = add("verify", _verify, "read checkpoints and check every checksum")
    verify.add_argument("checkpoint", type=Path, nargs="+", metavar="CHECKPOINT|DIR")
    diff = add("diff", _diff, "tell which leaves of two checkpoints differ")
    diff.add_argument("old", type=Path, metavar="OLD")
    diff.add_argument("new", type=Path, metavar="NEW")
    prune = add("prune", _prune, "remove all but the newest checkpoints of a directory")
    prune.add_argument("directory", type=Path, metavar="DIR")
    prune.add_argument("--keep", type=int, required=True, metavar="K", help="how many stay")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    try:
        code: int = args.act(args)
    except OSError as error:
        raise HpcftError(str(error)) from error
    return code


# What follows imports within functions, for only some of it needs libraries that load slowly.


def _ls(args: argparse.Namespace) -> int:
    from hpcft.ckpt.index import Damaged
    from hpcft.ckpt.reader import leaves, opened

    rows: list[dict[str, Any]] = []
    for checkpoint in _store(args.directory).committed():
        row: dict[str, Any] = {"step": checkpoint.step, "path": str(checkpoint.path)}
        try:
            with opened(checkpoint.state) as found:
                count = len(leaves(found.index))
                row |= {"bytes": found.file.size, "leaves": count, "damage": None}
        except (Damaged, OSError) as error:
            why = str(error).removeprefix(f"{checkpoint.state}: ")
            row |= {"bytes": None, "leaves": None, "damage": why}
        row["saved"] = checkpoint.path.stat().st_mtime
        rows.append(row)
    if args.json:
        _print_json(rows)
    else:
        table = Table("step", "saved", "size", "leaves", "name", "")
        for row in rows:
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved"]))
            size = _size(row["bytes"]) if row["bytes"] is not None else "?"
            name = Path(row["path"]).name
            damage = row["damage"] or ""
            table.add_row(str(row["step"]), saved, size, str(row["leaves"] or "?"), name, damage)
        _print(table if rows else f"there is no checkpoint in {args.directory}")
    return int(any(row["damage"] for row in rows))


def _show(args: argparse.Namespace) -> int:
    from hpcft.ckpt.reader import leaves, opened

    below = "/" + args.under.strip("/")
    rows: list[dict[str, Any]] = []
    with opened(_file(args.checkpoint)) as found:
        content = found.index
        for i in leaves(content):
            spec = content.specs[i]
            if below in ("/", spec.path) or spec.path.startswith(f"{below}/"):
                rows.append(
                    {
                        "path": spec.path,
                        "kind": spec.kind,
                        "dtype": spec.dtype,
                        "shape": list(spec.shape),
                        "bytes": spec.nbytes,
                        "offset": content.places[i],
                        "crc32c": content.checksums[i],
                    }
                )
        step = found.step
    if args.json:
        _print_json(rows)
    else:
        table = Table("path", "type", "shape", "size", title=f"step {step}")
        for row in rows:
            plain = row["kind"] not in ("tensor", "ndarray")
            shape = "" if plain else " x ".join(map(str, row["shape"])) or "scalar"
            kind = row["kind"] if plain else row["dtype"]
            table.add_row(row["path"], kind, shape, _size(row["bytes"]))
        table.add_section()
        table.add_row(f"{len(rows)} leaves", "", "", _size(sum(row["bytes"] for row in rows)))
        _print(table)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hpcft.ckpt._engine import Engine
    from hpcft.ckpt.index import Damaged
    from hpcft.ckpt.reader import opened, read

    engine = Engine(_MEMORY)
    failed = False
    for file in [file for target in args.checkpoint for file in _files(target)]:
        said: dict[str, Any] = {"path": str(file), "ok": True, "damaged": []}
        try:
            with opened(file) as found, _bar(str(file), not args.json) as advance:
                said["damaged"] = read(found, engine, lambda _: None, _watched(advance))
                said["step"] = found.step
        except (Damaged, OSError) as error:
            said |= {"ok": False, "why": str(error).removeprefix(f"{file}: ")}
        said["ok"] = said["ok"] and not said["damaged"]
        failed = failed or not said["ok"]
        if args.json:
            _print_json([said])
        elif said["ok"]:
            _print(f"good: {file}")
        else:
            _print(f"DAMAGED: {file}: {said.get('why') or ', '.join(said['damaged'])}")
    return int(failed)


def _watched(advance: Callable[[int, int], None]) -> Callable[[Any], None]:
    """Waits for a transfer and shows how far it is."""

    def watch(transfer: Any) -> None:
        while not transfer.wait(0.1):
            total, _, moved, _ = transfer.progress()
            advance(moved, total)

    return watch


def _diff(args: argparse.Namespace) -> int:
    from hpcft.ckpt.reader import leaves, opened

    def known(target: Path) -> dict[str, tuple[Any, int]]:
        with opened(_file(target)) as found:
            index = found.index
            return {
                index.specs[i].path: (index.specs[i], index.checksums[i]) for i in leaves(index)
            }

    old, new = known(args.old), known(args.new)
    rows: list[dict[str, Any]] = []
    for path in sorted(old.keys() | new.keys()):
        if path not in old or path not in new:
            rows.append({"path": path, "what": "only in new" if path in new else "only in old"})
        elif old[path][0] != new[path][0]:
            rows.append({"path": path, "what": "another type or shape"})
        elif old[path][1] != new[path][1]:
            rows.append({"path": path, "what": "another content"})
    if args.json:
        _print_json(rows)
    elif rows:
        table = Table("path", "difference")
        for row in rows:
            table.add_row(row["path"], row["what"])
        _print(table)
    else:
        _print("they hold the same")
    return int(bool(rows))


def _prune(args: argparse.Namespace) -> int:
    if args.keep < 1:
        raise UsageError(f"--keep {args.keep} would remove them all", "give 1 or more")
    store = _store(args.directory)
    old = store.committed()[: -args.keep]
    for checkpoint in old:
        if not args.dry_run:
            store.remove(checkpoint)
        if args.json:
            _print_json([{"removed": str(checkpoint.path), "step": checkpoint.step}])
        else:
            _print(f"{'would remove' if args.dry_run else 'removed'} {checkpoint.path}")
    if not old and not args.json:
        _print("there is nothing to remove")
    return 0


# -- targets and output ------------------------------------------------------------------------


def _store(directory: Path) -> Any:
    from hpcft.ckpt.store import Store

    if not directory.is_dir():
        raise UsageError(f"there is no directory {directory}", "name one that --ckpt-dir named")
    return Store(directory)


def _files(target: Path) -> list[Path]:
    """The files that are meant: of a checkpoint, or of all in a directory."""
    from hpcft.ckpt.store import STATE

    if target.is_file():
        return [target]
    if (target / STATE).is_file():
        return [target / STATE]
    files = [checkpoint.state for checkpoint in _store(target).committed()]
    if not files:
        raise UsageError(f"there is no checkpoint in {target}", "see hpcft ckpt ls")
    return files


def _file(target: Path) -> Path:
    return _files(target)[-1]


def _print_json(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row))


def _print(what: Table | str) -> None:
    # Not cut to some width where nobody looks at it.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False, soft_wrap=isinstance(what, str)).print(what)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@contextmanager
def _bar(title: str, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, at a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda moved, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(title)
        yield lambda moved, total: progress.update(task, completed=moved, total=total)
