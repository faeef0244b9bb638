"""Saving and restoring a state, by hpcft and by its peers, on the same disk, in one run.

python benchmarks/checkpoint.py --gib 2 --repeat 5 --dir .

Everything durable ends with an fsync. Restores are cold: the page cache is dropped before (as
root). fio says what the disk can do, with the best of many settings. The sides take turns, so that
what changes on the machine changes for all. The stall is the time for which a save keeps training
from going on; with overlap, that is the call and what is left of the copying when the optimizer
would change the state. What it costs besides, by taking processors, is told as well.

python benchmarks/checkpoint.py --device cuda --gib 8 --dir /local/disk

has the state on a GPU and measures the stalls alone, against DCP's async_save with the staging that
it has for GPUs: pinned memory that is kept, copied to without waiting.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import torch
import torch.distributed.checkpoint as dcp
from peers import machine
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Save, Saver
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
        self.engine = Engine(pool, niceness=19)
        self.store = Store(folder / "hpcft").create()
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


@dataclass(frozen=True)
class Fio:
    """How fio is told to go about it."""

    engine: str
    block: str
    depth: int
    jobs: int
    direct: int

    def run(self, folder: Path, what: str, nbytes: int, fresh: bool = False) -> float:
        """Bytes a second, from the start to the end of the fsync."""
        file = folder / "fio"
        if fresh:
            file.unlink(missing_ok=True)
        part = nbytes // self.jobs >> 24 << 24
        command = f"fio --name=x --rw={what} --bs={self.block} --direct={self.direct} --size={part}"
        command += f" --ioengine={self.engine} --iodepth={self.depth} --numjobs={self.jobs}"
        command += f" --offset_increment={part} --end_fsync=1 --overwrite=0 --fallocate=none"
        command += f" --group_reporting --output-format=json --filename={file}"
        done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        # Of several jobs fio adds the run times up.
        return part * self.jobs / (job["job_runtime"] / self.jobs / 1000)

    @staticmethod
    def best(folder: Path, what: str, nbytes: int, fresh: bool = False) -> Fio:
        """The settings with which this disk is fastest."""
        found = {}
        for engine, block, depth, jobs, direct in itertools.product(
            ("io_uring", "libaio"), ("1M", "4M", "16M"), (4, 16), (1, 2), (0, 1)
        ):
            if engine == "libaio" and not direct:
                continue  # it would only wait for each
            candidate = Fio(engine, block, depth, jobs, direct)
            if what == "read":
                drop_caches()
            found[candidate] = candidate.run(folder, what, nbytes, fresh)
        winner = max(found, key=lambda candidate: found[candidate])
        print(f"fio, {what}{', fresh file' if fresh else ''}: best of {len(found)} is {winner}")
        return winner


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


def synchronize(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()


class Training:
    """Steps that compute for a known while, without touching the state but at their end."""

    def __init__(self, device: str) -> None:
        # On a GPU a step of some tenths of a second as well.
        self._a = torch.randn(*((1500, 1500) if device == "cpu" else (8192, 8192)), device=device)
        self._device = device

    def compute(self) -> None:
        for _ in range(12):
            self._a @ self._a
        synchronize(self._device)

    def steps(self, count: int) -> float:
        """Seconds a step takes."""
        return statistics.median(timed(self.compute) for _ in range(count))


class Snapshot(Protocol):
    """A save on its way."""

    def wait_copied(self, in_order: bool = False) -> None:
        """The state may change again, if ``in_order`` by what the device is given from now on."""

    def advance(self) -> bool:
        """Whether all of it is written."""

    def finish(self) -> None:
        """Wait until it is durable."""


class Dcp:
    """A save by ``torch.distributed.checkpoint.async_save``."""

    def __init__(self, folder: Path, state: State, stager: DefaultStager | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        answer = dcp.async_save(
            {"model": state}, checkpoint_id=folder, no_dist=True, async_stager=stager
        )
        background = isinstance(answer, AsyncSaveResponse)
        self._staged = answer.staging_completion if background else None
        self._over = answer.upload_completion if background else answer

    def wait_copied(self, in_order: bool = False) -> None:
        if self._staged:
            self._staged.result()

    def advance(self) -> bool:
        return self._over.done()

    def finish(self) -> None:
        self._over.result()


def stagers(device: str) -> dict[str, DefaultStager | None]:
    """DCP's ways of copying a state; all but the first keep the copy's memory from save to save."""
    gpu = device != "cpu"
    ways = {"use_pinned_memory": gpu, "use_shared_memory": False, "use_non_blocking_copy": gpu}
    return {
        "DCP": None,
        "DCP, memory kept": DefaultStager(StagingOptions(**ways, use_async_staging=False)),
        "DCP, memory kept, overlap": DefaultStager(StagingOptions(**ways)),
    }


def stalls(
    ours: Hpcft, folder: Path, state: State, repeat: int, device: str
) -> dict[str, dict[str, list]]:
    """What saving costs training: the time it is held up, by how much the step in which it saves is
    longer, and by how much the steps are until all is written."""
    training = Training(device)
    training.steps(3)
    sides: dict[str, Callable[[], Snapshot]] = {
        "hpcft": lambda: ours.begin(state),
        "hpcft, overlap": lambda: ours.begin(state),
    } | {
        name: lambda stager=stager: Dcp(folder / "async", state, stager)
        for name, stager in stagers(device).items()
    }
    found: dict[str, dict[str, list]] = {
        kind: defaultdict(list) for kind in ("held up", "longer step", "slower")
    }
    for turn in range(repeat + 1):
        for name, begin in sides.items():
            plain = training.steps(5)
            began = time.perf_counter()
            save = begin()
            if "overlap" not in name:
                save.wait_copied()
            held_up = time.perf_counter() - began
            training.compute()  # forward and backward pass; the state does not change
            # Before optimizer.step(), which the device comes to when it has copied.
            held_up += timed(lambda save=save: (save.wait_copied(True), synchronize(device)))
            longer = time.perf_counter() - began - plain
            steps = []
            while not save.advance():
                steps.append(timed(training.compute))
            save.finish()
            ours.forget(recycle=True)
            if turn == 0:
                continue  # memory is touched for the first time
            found["held up"][name].append(held_up)
            found["longer step"][name].append(longer)
            if steps:
                found["slower"][name].append(100 * (statistics.mean(steps) / plain - 1))
    return found


def many_small(folder: Path, repeat: int) -> dict[str, list[float]]:
    """Seconds for 10,000 tensors of 1 KiB; of the processors, too, as "cpu"."""
    state = {f"layers.{i}.weight": torch.randn(256) for i in range(10_000)}
    ours = Hpcft(folder / "small", 64 << 20)
    save, _ = peers(folder, state)["torch.save"]
    found: dict[str, list[float]] = defaultdict(list)

    def measure(name: str, work: Callable[[], object]) -> None:
        began = time.process_time()
        found[name].append(timed(work))
        found[f"{name}, cpu"].append(time.process_time() - began)

    measure("hpcft, first", lambda: ours.save(state))
    for _ in range(repeat):
        ours.forget(recycle=True)
        measure("hpcft", lambda: ours.save(state))
        measure("torch.save", save)
        measure("hpcft restore", ours.restore)
        measure("torch.load", readers(folder, state)["torch.load"])
    return found


def peak(what: str) -> int:
    """Bytes of resident memory: now (VmRSS), or at most since :func:`forget_peak` (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2, help="size of the state (default 2)")
    parser.add_argument("--tensors", type=int, default=512, help="of how many (default 512)")
    parser.add_argument("--repeat", type=int, default=5, help="of each (default 5)")
    parser.add_argument("--pool", type=float, help="GiB of staging memory (default: the state's)")
    parser.add_argument("--device", default="cpu", help="where the state is, such as cuda")
    parser.add_argument("--small", action="store_true", help="measure many small tensors alone")
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk to be measured")
    args = parser.parse_args()
    nbytes = int(args.gib * GIB)
    pool = int((args.pool or args.gib * 1.1 + 0.1) * GIB)
    print(machine())
    if args.small:
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.dir) as name:
            report("s, 10,000 of 1 KiB", many_small(Path(name), args.repeat))
        return
    print(f"{args.gib:g} GiB in {args.tensors} tensors, staging pool {pool / GIB:.2f} GiB")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.dir))
    try:
        if args.device != "cpu":
            measure_device(folder, make_state(nbytes, args.tensors), pool, args)
            return
        measure(folder, make_state(nbytes, args.tensors), pool, args.repeat)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, state: State, pool: int, repeat: int) -> None:
    """Measure all of it and print."""
    nbytes = sum(tensor.nbytes for tensor in state.values())
    forget_peak()
    before = peak("VmRSS")
    ours = Hpcft(folder, pool)
    rates: dict[str, list[float]] = defaultdict(list)
    ours.save(state)  # touches the pool's memory, makes the layout
    extra = peak("VmHWM") - before - pool
    print(f"memory of the first save: the pool and {extra / (1 << 20):.0f} MiB")
    best = {
        "fresh": Fio.best(folder, "write", nbytes, fresh=True),
        "again": Fio.best(folder, "write", nbytes),
        "read": Fio.best(folder, "read", nbytes),
    }
    for _ in range(repeat):
        ours.forget(recycle=False)
        rates["hpcft, fresh file"].append(nbytes / timed(lambda: ours.save(state)))
        ours.forget(recycle=True)
        rates["hpcft, file used again"].append(nbytes / timed(lambda: ours.save(state)))
        rates["fio, fresh file"].append(best["fresh"].run(folder, "write", nbytes, fresh=True))
        rates["fio, file used again"].append(best["again"].run(folder, "write", nbytes))
        for name, (save, _) in peers(folder, state).items():
            rates[name].append(nbytes / timed(save))
        drop_caches()
        rates["fio read"].append(best["read"].run(folder, "read", nbytes))
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
    report_stalls(stalls(ours, folder, state, repeat, "cpu"), "cpu")
    small = many_small(folder, repeat)
    report("s, 10,000 of 1 KiB", small)


def measure_device(folder: Path, state: State, pool: int, args: argparse.Namespace) -> None:
    """Measure what saving a state on a device costs training, and print."""
    state = {name: tensor.to(args.device) for name, tensor in state.items()}
    ours = Hpcft(folder, pool)
    ours.save(state)  # pins the pool, makes the layout
    nbytes = sum(tensor.nbytes for tensor in state.values())
    rates: dict[str, list[float]] = defaultdict(list)

    def restore() -> None:
        path = ours.store.committed()[-1].state
        load(path, ours.engine, target=lambda keys, spec: state[keys[-1]])

    for _ in range(args.repeat):
        ours.forget(recycle=True)
        rates["hpcft"].append(nbytes / timed(lambda: ours.save(state)) / GIB)
        drop_caches()
        rates["hpcft restore, in place"].append(nbytes / timed(restore) / GIB)
    report("GiB/s", rates)
    report_stalls(stalls(ours, folder, state, args.repeat, args.device), args.device)
    print(f"pool in use at most: {ours.engine.peak / GIB:.2f} GiB")


def report_stalls(costs: dict[str, dict[str, list]], device: str) -> None:
    """Print what :func:`stalls` has found."""
    for kind in ("held up", "longer step"):
        milliseconds = {k: [1000 * v for v in vs] for k, vs in costs[kind].items()}
        report(f"ms, {kind}", milliseconds)
    report("%, slower until written", costs["slower"])
    for name in ("hpcft, overlap", "hpcft"):
        for peer in stagers(device):
            ratio = pairwise(costs["held up"][name], costs["held up"][peer])
            print(f"held up, {name} / {peer}: {ratio:.3f}")


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
