"""A small training with everything that is easy to get wrong after a failure.

Dropout (random numbers), batch normalisation (buffers), Adam (optimizer state), a scheduler, a
value in the state. Every rank says which step it has completed, for the tests to watch.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hpcft


class Sleepy(Dataset[float]):
    """Keeps a worker of a data loader busy."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        time.sleep(self.seconds)
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pace", type=float, default=0.01, help="seconds of sleep in a step")
    parser.add_argument(
        "--slow", type=int, default=-1, help="this rank sleeps 50 ms more in a step"
    )
    parser.add_argument(
        "--late", nargs=3, type=float, default=(-1, 0, 0), metavar=("PROCESS", "SECONDS", "SHARE")
    )
    parser.add_argument(
        "--slow-process", type=int, default=-1, help="as --slow, but whatever rank it plays"
    )
    parser.add_argument(
        "--slow-until", default="", metavar="FILE", help="that is as fast again once this is there"
    )
    parser.add_argument("--until", default="", metavar="FILE", help="no pace once this is there")
    parser.add_argument("--busy", type=float, default=0.0, help="seconds holding the GIL, step 5")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--on-shrink", default="keep-lr")
    parser.add_argument("--raise-at", type=int, default=-1, help="every rank 1 raises in this step")
    parser.add_argument("--deadlock-at", type=int, default=-1, help="rank 1 deadlocks, once")
    parser.add_argument("--lag-at", type=int, default=-1, help="rank 2 dies as rank 1 lags behind")
    parser.add_argument("--save-at", type=int, action="append", default=[], help="state.save()")
    parser.add_argument("--save-overlap", action="store_true")
    parser.add_argument("--save-amid", action="store_true", help="where it must not be called")
    parser.add_argument("--digest-every", type=int, default=1 << 30, metavar="STEPS")
    parser.add_argument("--device", default="cpu", help="cuda: that of this process's LOCAL_RANK")
    parser.add_argument("--evaluate", type=float, metavar="SEC", help="so long, in a worker")
    parser.add_argument("--suicide", action="append", default=[], metavar="WHEN:RANK")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(1)
    if args.device == "cuda":
        number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        torch.cuda.set_device(number)
        # Else its matrix products are not the same every time.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    job = hpcft.init(on_shrink=args.on_shrink)
    data = TensorDataset(torch.randn(960, 16), torch.randint(0, 4, (960,)))
    net = nn.Sequential(
        nn.Linear(16, args.width),
        nn.BatchNorm1d(args.width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(args.width, 4),
    )
    original = int(os.environ.get("PMIX_RANK", 0))
    if "LOCAL_RANK" in os.environ:
        print(f"local {os.environ['LOCAL_RANK']} of {os.environ['LOCAL_WORLD_SIZE']}", flush=True)

    def die(moment: str) -> None:
        # By process, not by role: who has been adopted is not harmed again.
        if not job.spare and original == job.rank and f"{moment}:{job.rank}" in args.suicide:
            if all(f"{moment}:{rank}" in args.suicide for rank in range(job.size)):
                # Else the first to die keeps the others from coming to it.
                dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    net.to(args.device)
    die("wrapping")
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9)
    sampler = hpcft.ElasticBatchSampler(len(data), batch_size=16)
    loader = DataLoader(data, batch_sampler=sampler)
    state = hpcft.State(
        model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, seen=0
    )

    def harm() -> None:
        die(str(state.step))
        if state.step == args.deadlock_at and original == job.rank == 1 and not job.spare:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()

    def lag() -> None:
        """Rank 0 completes the step, rank 1 meets the failure before it has stepped."""
        if state.step == args.lag_at and original == job.rank and not job.spare:
            time.sleep((0, 1.0, 0.4)[job.rank])
            if job.rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    chance = random.Random(original)
    who, long, share = args.late

    def train(state: hpcft.State) -> None:
        while state.step < args.steps:
            for inputs, targets in loader:
                harm()
                inputs, targets = inputs.to(args.device), targets.to(args.device)
                if state.step == args.raise_at and job.rank == 1 and not job.spare:
                    raise ValueError("this script is wrong")
                if original == who and not job.spare and chance.random() < share:
                    time.sleep(long)
                slow = original == args.slow_process and not os.path.exists(args.slow_until)
                if slow or job.rank == args.slow:
                    time.sleep(0.05)
                loss = F.cross_entropy(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                if args.save_amid:
                    state.save()
                lag()
                optimizer.step()
                scheduler.step()
                state.seen += len(inputs)
                if args.busy and state.step == 5 and job.rank == 0:
                    # A regular expression that backtracks: one long call that keeps the GIL.
                    end = time.monotonic() + args.busy
                    while time.monotonic() < end:
                        sum(range(20_000_000))
                if not (args.until and os.path.exists(args.until)):
                    time.sleep(args.pace)
                state.commit(loss=loss.item())
                print(f"step {state.step} rank {job.rank} size {job.size}", flush=True)
                if state.step % args.digest_every == 0 and job.rank == 0:
                    print(f"after step {state.step}: {state.digest()}", flush=True)
                if state.step in args.save_at:
                    die("save")
                    state.save(overlap=args.save_overlap)
                    die("saved")
                if state.step >= args.steps:
                    break

    def evaluate(state: hpcft.State) -> dict[str, float]:
        assert not net.training
        assert not torch.is_grad_enabled()
        print(f"evaluating step {state.step} in {os.getpid()}", flush=True)
        for _ in DataLoader(Sleepy(args.evaluate), num_workers=1 if args.evaluate else 0):
            pass
        return {"weight": sum(p.double().sum().item() for p in net.parameters())}

    die("run")
    job.run(train, state, None if args.evaluate is None else evaluate)
    die("end")
    print(f"digest {state.digest()}", flush=True)
    print(f"seen {state.seen} lr {optimizer.param_groups[0]['lr']:.8g}", flush=True)


if __name__ == "__main__":
    main()
