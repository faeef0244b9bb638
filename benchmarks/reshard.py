"""Sharded state saved on some ranks and restored on fewer, by hpcft and by DCP, in one run.

By hpcft twice: from one file on the disk, and from the memory of the machine (--ckpt-near), which a
restore after most failures reads.

python benchmarks/reshard.py --gib 2 --saved-on 8 --restored-on 3 --dir .

Every rank holds a shard of every tensor (DTensor, cut along the first dimension). What a restore
reads from the disk is what the kernel counts for the processes (``read_bytes``), with a cold page
cache (dropped before, as root). What was restored is compared with what was saved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from checkpoint import GIB, drop_caches, flush
from peers import machine

_COLUMNS = 1024
_SIDES = ("hpcft", "hpcft, from memory", "DCP")


def rank_main(args: argparse.Namespace) -> None:
    """Save or restore, as one of the ranks."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from mpi4py import MPI
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, zeros

    from hpcft.ckpt import scattered
    from hpcft.ckpt._engine import Engine
    from hpcft.ckpt.near import NearStore
    from hpcft.ckpt.restore import load
    from hpcft.ckpt.save import Saver
    from hpcft.ckpt.store import Store
    from hpcft.train.comm_ranks import CommRanks

    comm = MPI.COMM_WORLD
    address = f"tcp://127.0.0.1:{args.port}"
    dist.init_process_group("gloo", init_method=address, rank=comm.rank, world_size=comm.size)
    mesh = init_device_mesh("cpu", (comm.size,))
    rows = int(args.gib * GIB) // args.tensors // 4 // _COLUMNS
    names = [f"layers.{i}.weight" for i in range(args.tensors)]
    state = {
        name: zeros((rows + i, _COLUMNS), device_mesh=mesh, placements=[Shard(0)])
        for i, name in enumerate(names)
    }

    def expected(number: int, tensor: DTensor) -> torch.Tensor:
        """What this rank's shard of a tensor holds: rows tell which they are."""
        mine = tensor.to_local()
        sizes = comm.allgather(mine.shape[0])
        first = sum(sizes[: comm.rank])
        values = torch.arange(first, first + mine.shape[0], dtype=torch.float32)
        return values[:, None] + number + torch.arange(_COLUMNS) / _COLUMNS

    folder, engine = Path(args.dir), Engine(512 << 20)
    store, near, ranks = Store(folder / "hpcft"), NearStore(memory(folder)), CommRanks(comm)
    if args.role == "save":
        if comm.rank == 0:
            store.create()
        for number, tensor in enumerate(state.values()):
            tensor.to_local().copy_(expected(number, tensor))
        for saver in (Saver(store, ranks, engine), Saver(near, ranks, engine, layout="per-rank")):
            save = saver.begin(1, {"model": state})
            while not save.advance():
                time.sleep(0.001)
            save.finish()
        dcp.save({"model": state}, checkpoint_id=folder / "dcp")
        comm.Barrier()
        return

    def by_hpcft() -> None:
        load(store.committed()[-1].state, engine, ranks, lambda keys, _: state[keys[1]])

    def from_memory() -> None:
        [found] = scattered.find(ranks, near)
        target = lambda keys, _: state[keys[1]]  # noqa: E731
        scattered.load(found, near, engine, ranks, target, True, print)

    def by_dcp() -> None:
        dcp.load({"model": state}, checkpoint_id=folder / "dcp")

    def measured(restore: Callable[[], None]) -> dict[str, float]:
        for tensor in state.values():
            tensor.to_local().zero_()
        if comm.rank == 0:
            drop_caches()
        comm.Barrier()
        read, began = _read_bytes(), time.perf_counter()
        restore()
        comm.Barrier()
        seconds = time.perf_counter() - began
        total = comm.allreduce(_read_bytes() - read)
        right = all(
            torch.equal(tensor.to_local(), expected(number, tensor))
            for number, tensor in enumerate(state.values())
        )
        return {"bytes": total, "seconds": seconds, "right": comm.allreduce(right, MPI.MIN)}

    nbytes = sum(tensor.nelement() * 4 for tensor in state.values())
    for _ in range(args.repeat):
        for name, restore in zip(_SIDES, (by_hpcft, from_memory, by_dcp), strict=True):
            found = measured(restore)
            if comm.rank == 0:
                print(json.dumps({"side": name, "needed": nbytes, **found}), flush=True)


def memory(folder: Path) -> Path:
    """Where the checkpoint in memory is."""
    return Path("/dev/shm") / f"hpcft-benchmark-{folder.name}"


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2, help="size of the state (default 2)")
    parser.add_argument("--tensors", type=int, default=64, help="of how many (default 64)")
    parser.add_argument("--saved-on", type=int, default=8, help="ranks (default 8)")
    parser.add_argument("--restored-on", type=int, default=3, help="ranks (default 3)")
    parser.add_argument("--repeat", type=int, default=5, help="restores (default 5)")
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk to be measured")
    parser.add_argument("--role", choices=("save", "restore"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        rank_main(args)
        return
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="reshard-", dir=args.dir.absolute()))
    try:
        ranks(args, folder, "save", args.saved_on)
        for file in (folder / "hpcft", folder / "dcp"):
            flush(file)
        said = ranks(args, folder, "restore", args.restored_on)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(memory(folder), ignore_errors=True)
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    print(f"{args.gib:g} GiB, saved on {args.saved_on} ranks, restored on {args.restored_on}")
    for side in _SIDES:
        own = [row for row in rows if row["side"] == side]
        if not all(row["right"] for row in own):
            sys.exit(f"{side} has restored something else than was saved")
        read = statistics.median(row["bytes"] / row["needed"] for row in own)
        rate = statistics.median(row["needed"] / row["seconds"] / GIB for row in own)
        print(f"{side:>18}: read {read:.4f} times what is needed, {rate:.2f} GiB/s")


def ranks(args: argparse.Namespace, folder: Path, role: str, count: int) -> str:
    """Have so many ranks do their part; what rank 0 says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mpiexec", "--oversubscribe", "--bind-to", "none", "-n", str(count)]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    command += [sys.executable, __file__, "--role", role, "--dir", str(folder)]
    command += ["--port", str(port), "--gib", str(args.gib), "--tensors", str(args.tensors)]
    command += ["--repeat", str(args.repeat)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
