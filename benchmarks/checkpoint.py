"""Saving and restoring a state, by hpcft and by its peers, on the same disk, in one run.

python benchmarks/checkpoint.py --gib 2 --repeat 5 --dir .

Everything durable ends with an fsync. Restores are cold: the page cache is dropped before (as
root). fio says what the disk can do. The sides take turns, so that what changes on the machine
changes for all. The stall is what a training step pays: a step computes for a while, then asks for
a save; its extra time over steps without one is the stall.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch
import torch.distributed.checkpoint as dcp
from peers import machine
from safetensors.torch import load_file, save_file

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Alone, Save, Saver
from hpcft.ckpt.store import Store

GIB = 1 << 30
State = dict[str, torch.Tensor]


def make_state(nbytes: int, tensors: int) -> State:
    """Tensors of several sizes, as a model and its optimizer have."""
    torch.manual_seed(0)
    each = nbytes // tensors // 4
    sizes = [each // 2, each, each + each // 2]
    return {f"layers.{i}.weight": torch.randn(sizes[i % 3]) for i in range(tensors)}


def flush(path: Path) -> None:
    """fsync a file, or all files of a directory."""
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def drop_caches() -> None:
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Hpcft:
    """hpcft's own."""

    def __init__(self, folder: Path, pool: int) -> None:
        self.engine = Engine(pool, niceness=5)
        self.store = Store(folder / "hpcft")
        self.saver = Saver(self.store, Alone(), self.engine)
        self.step = 0

    def begin(self, state: State) -> Save:
        self.step += 1
        return self.saver.begin(self.step, {"model": state})

    @staticmethod
    def complete(save: Save) -> None:
        save.wait_copied()
        while not save.advance():
            time.sleep(0.0005)
        save.finish()

    def save(self, state: State) -> None:
        self.complete(self.begin(state))

    def forget(self, recycle: bool) -> None:
        """Have the next save write over this one's file, or into a fresh one."""
        for checkpoint in self.store.committed()[:-1]:
            self.store.discard(checkpoint)
        if not recycle:
            self.store.sweep()

    def restore(self) -> None:
        load(self.store.committed()[-1].state, self.engine)


def fio(folder: Path, what: str, nbytes: int, overwrite: bool) -> float:
    """Bytes a second, the better of the two engines."""
    best = 0.0
    for engine in ("io_uring", "libaio"):
        file = folder / f"fio-{engine}"
        if not overwrite and what == "write":
            file.unlink(missing_ok=True)
        command = f"fio --name=x --rw={what} --bs=4M --direct=1 --ioengine={engine} --iodepth=8 "
        command += f"--size={nbytes} --end_fsync=1 --output-format=json --filename={file}"
        command += " --overwrite=0 --fallocate=none"
        done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        # From the start to the end of the fsync.
        best = max(best, nbytes / (job["job_runtime"] / 1000))
    return best


def peers(folder: Path, state: State) -> dict[str, tuple[Callable[[], object], Path]]:
    """How each peer saves, and where."""

    def torch_save() -> None:
        torch.save(state, folder / "torch.pt")
        flush(folder / "torch.pt")

    def safetensors() -> None:
        save_file(state, folder / "model.safetensors")
        flush(folder / "model.safetensors")

    def distributed() -> None:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        dcp.save({"model": state}, checkpoint_id=folder / "dcp", no_dist=True)
        flush(folder / "dcp")

    def plain_h5py() -> None:
        with h5py.File(folder / "plain.h5", "w") as file:
            for name, tensor in state.items():
                file.create_dataset(name, data=tensor.numpy())
        flush(folder / "plain.h5")

    return {
        "torch.save": (torch_save, folder / "torch.pt"),
        "safetensors": (safetensors, folder / "model.safetensors"),
        "DCP": (distributed, folder / "dcp"),
        "h5py": (plain_h5py, folder / "plain.h5"),
    }


def readers(folder: Path, state: State) -> dict[str, Callable[[], object]]:
    """How each peer restores."""

    def distributed() -> None:
        target = {"model": {name: torch.empty_like(tensor) for name, tensor in state.items()}}
        dcp.load(target, checkpoint_id=folder / "dcp", no_dist=True)

    return {
        "torch.load": lambda: torch.load(folder / "torch.pt", weights_only=True),
        "safetensors load": lambda: load_file(folder / "model.safetensors"),
        "DCP load": distributed,
    }


class Training:
    """Steps that compute for a known while, without touching the state but at their end."""

    def __init__(self) -> None:
        self._a = torch.randn(1500, 1500)

    def compute(self) -> None:
        for _ in range(12):
            self._a @ self._a

    def steps(self, count: int) -> float:
        """Seconds a step takes."""
        return statistics.median(timed(self.compute) for _ in range(count))


def stalls(ours: Hpcft, folder: Path, state: State, repeat: int) -> dict[str, list[float]]:
    """What saving costs the step it is asked for in, and the steps while it drains."""
    training = Training()
    training.steps(3)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeat):
        plain = training.steps(5)

        save = None
        began = time.perf_counter()
        save = ours.begin(state)
        training.compute()  # forward and backward; the state does not change
        save.wait_copied()  # before optimizer.step()
        found["hpcft, overlap"].append(time.perf_counter() - began - plain)
        drained(found, "hpcft", training, plain, lambda save=save: save.advance())
        save.finish()
        ours.forget(recycle=True)

        began = time.perf_counter()
        save = ours.begin(state)
        save.wait_copied()
        found["hpcft"].append(time.perf_counter() - began)
        ours.complete(save)
        ours.forget(recycle=True)

        shutil.rmtree(folder / "async", ignore_errors=True)
        began = time.perf_counter()
        future = dcp.async_save({"model": state}, checkpoint_id=folder / "async", no_dist=True)
        found["DCP async_save"].append(time.perf_counter() - began)
        drained(found, "DCP", training, plain, future.done)
        future.result()
    return found


def drained(
    found: dict[str, list[float]],
    name: str,
    training: Training,
    plain: float,
    over: Callable[[], bool],
) -> None:
    """How much longer steps take until a save is through, in percent."""
    steps = []
    while not over():
        steps.append(timed(training.compute))
    if steps:
        found[f"slower while {name} drains, %"].append(100 * (statistics.mean(steps) / plain - 1))


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2, help="size of the state (default 2)")
    parser.add_argument("--tensors", type=int, default=512, help="of how many (default 512)")
    parser.add_argument("--repeat", type=int, default=5, help="of each (default 5)")
    parser.add_argument("--pool", type=float, help="GiB of staging memory (default: the state's)")
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk to be measured")
    args = parser.parse_args()
    nbytes = int(args.gib * GIB)
    pool = int((args.pool or args.gib * 1.1 + 0.1) * GIB)
    print(machine())
    print(f"{args.gib:g} GiB in {args.tensors} tensors, staging pool {pool / GIB:.2f} GiB")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.dir))
    try:
        measure(folder, make_state(nbytes, args.tensors), pool, args.repeat)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, state: State, pool: int, repeat: int) -> None:
    """Measure all of it and print."""
    nbytes = sum(tensor.nbytes for tensor in state.values())
    ours = Hpcft(folder, pool)
    rates: dict[str, list[float]] = defaultdict(list)
    ours.save(state)  # touches the pool's memory, makes the layout
    for _ in range(repeat):
        ours.forget(recycle=False)
        rates["hpcft, fresh file"].append(nbytes / timed(lambda: ours.save(state)))
        ours.forget(recycle=True)
        rates["hpcft, file used again"].append(nbytes / timed(lambda: ours.save(state)))
        rates["fio, fresh file"].append(fio(folder, "write", nbytes, overwrite=False))
        rates["fio, file used again"].append(fio(folder, "write", nbytes, overwrite=True))
        for name, (save, _) in peers(folder, state).items():
            rates[name].append(nbytes / timed(save))
        drop_caches()
        rates["fio read"].append(fio(folder, "read", nbytes, overwrite=True))
        drop_caches()
        rates["hpcft restore"].append(nbytes / timed(ours.restore))
        for name, restore in readers(folder, state).items():
            drop_caches()
            rates[name].append(nbytes / timed(restore))
    report("GiB/s", {name: [rate / GIB for rate in found] for name, found in rates.items()})
    for name, peer in (
        ("hpcft, file used again", "fio, file used again"),
        ("hpcft, fresh file", "fio, fresh file"),
        *((f"hpcft, {kind}", peer) for kind in ("fresh file",) for peer in peers(folder, state)),
        ("hpcft restore", "fio read"),
        *(("hpcft restore", peer) for peer in readers(folder, state)),
    ):
        print(f"{name} / {peer}: {pairwise(rates[name], rates[peer]):.2f}")
    costs = stalls(ours, folder, state, repeat)
    milliseconds = {k: [1000 * v for v in vs] for k, vs in costs.items() if "%" not in k}
    report("ms of stall", milliseconds)
    report("percent", {k: vs for k, vs in costs.items() if "%" in k})
    for name in ("hpcft, overlap", "hpcft"):
        ratio = pairwise(costs[name], costs["DCP async_save"])
        print(f"stall of {name} / DCP async_save: {ratio:.3f}")


def pairwise(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of each turn."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def report(unit: str, found: dict[str, list[Any]]) -> None:
    print(f"\n{unit:>32}   median      min      max")
    for name, values in found.items():
        print(f"{name:>32} {statistics.median(values):8.2f} {min(values):8.2f} {max(values):8.2f}")
    print()


if __name__ == "__main__":
    main()
