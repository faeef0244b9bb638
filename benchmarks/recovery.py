"""How long a killed rank stops the training: hpcft with a spare, against torchrun's restart.

From SIGKILL to the end of the next step completed after it. Under hpcft the spare takes over;
torchrun starts all ranks again from the last checkpoint, which is in memory (/dev/shm), written at
every step; it looks after its ranks every 100 ms.

    python benchmarks/recovery.py                          4 ranks, 10 M parameters, both sides
    python benchmarks/recovery.py --table                  hpcft alone, 2..16 ranks, 1..100 M
    python benchmarks/recovery.py --ranks 8 --params 1e6
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from dataclasses import dataclass
from statistics import median

from peers import HpcftRun, TorchrunRun, machine, step_time

#: Bytes a rank takes for a parameter (itself, gradient, two of Adam's, DDP's bucket), and besides.
_PER_PARAMETER, _BESIDES = 20, 400 << 20


@dataclass(frozen=True)
class Recovery:
    """One kill; all in seconds.

    total: from the kill to the end of the next step.
    detect: until the survivors are told.
    halt: until rank 0 comes to the next edge of its step, where it can be broken off.
    agree, build, transfer: parts of the recovery.
    step: the step that was hit, done again.
    """

    total: float
    detect: float
    halt: float
    agree: float
    build: float
    transfer: float
    step: float


def _victim(run: HpcftRun, rng: random.Random) -> int:
    return int(rng.choice(run.ranks())["pid"])


def _kill(pid: int) -> float:
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    return at


def of_hpcft(
    ranks: int, params: float, kills: int, spares: int, rng: random.Random
) -> tuple[list[Recovery], float]:
    """Kill ranks, one for each spare of a run, in as many runs as it takes.

    Returns
    -------
    The recoveries, and the length of an undisturbed step in seconds.
    """
    recoveries: list[Recovery] = []
    step = 0.0
    while len(recoveries) < kills:
        with HpcftRun(ranks, spares, ["--params", str(params)]) as run:
            run.more_steps(8)
            step = step or step_time(run.stamps())
            for number in range(min(spares, kills - len(recoveries))):
                time.sleep(rng.uniform(0, 2 * step))
                killed = _kill(_victim(run, rng))
                run.wait_for("recovery", lambda n=number: len(run.events("recovered")) > n)
                recoveries.append(_account(run, killed))
                run.more_steps(4)
    return recoveries, step


def _account(run: HpcftRun, killed: float) -> Recovery:
    known = run.events("failure")[-1]
    resumed, stepped = run.events("resume")[-1], run.events("recovered")[-1]
    phases = resumed["detail"]["phases"]
    told = known["time"] + known["detail"]["detect_s"]
    recover = resumed["detail"]["recover_s"]
    build, transfer = phases["build_s"], phases["transfer_s"]
    return Recovery(
        total=stepped["time"] - killed,
        detect=told - killed,
        halt=max(0.0, resumed["time"] - recover - told),
        agree=recover - build - transfer,
        build=build,
        transfer=transfer,
        step=stepped["time"] - resumed["time"],
    )


def of_torchrun(ranks: int, params: float, kills: int, rng: random.Random) -> list[float]:
    """Kill ranks; returns the times from the kill to the end of the next step, in seconds."""
    times: list[float] = []
    with TorchrunRun(ranks, ["--params", str(params), "--save-every", "1"]) as run:
        for _ in range(kills):
            run.more_steps(8)
            before = {stamp.pid for stamp in run.stamps()}
            killed = _kill(rng.choice(run.workers()))

            def first_after(before: set[int] = before) -> float:
                return next((s.time for s in run.stamps() if s.pid not in before), 0.0)

            times.append(run.wait_for("the restart", first_after) - killed)
    return times


def _room() -> float:
    """Bytes of memory a run may take."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.9


def _fits(ranks: int, params: float) -> bool:
    return (ranks + 1) * (params * _PER_PARAMETER + _BESIDES) < _room()


def _row(ranks: int, params: float, recoveries: list[Recovery], step: float) -> str:
    def middle(name: str) -> str:
        return f"{1000 * median(getattr(r, name) for r in recoveries):.1f}"

    worst = 1000 * max(r.total for r in recoveries)
    parts = " | ".join(map(middle, ("detect", "halt", "agree", "build", "transfer", "step")))
    return (
        f"| {ranks} | {params / 1e6:g} M | {middle('total')} | {worst:.0f} | {parts} "
        f"| {1000 * step:.0f} | {len(recoveries)} |"
    )


_HEAD = """\
| ranks | parameters | total | worst | detect | halt | agree | build | transfer | step again \
| undisturbed step | kills |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--params", type=float, default=10e6)
    parser.add_argument("--kills", type=int, default=10, help="kills under hpcft (default 10)")
    parser.add_argument("--spares", type=int, default=1, help="spares, and kills, a run (1)")
    parser.add_argument(
        "--peer-kills", type=int, default=3, help="under torchrun; 0: hpcft alone (default 3)"
    )
    parser.add_argument("--table", action="store_true", help="hpcft alone, over many sizes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    print(f"{machine()}; times in ms\n\n{_HEAD}", flush=True)
    if args.table:
        for params in (1e6, 10e6, 100e6):
            for ranks in (2, 4, 8, 16):
                if not _fits(ranks, params):
                    print(f"| {ranks} | {params / 1e6:g} M | too little memory | | | | | | | | | |")
                    continue
                kills = 3 if params > 20e6 else args.kills
                ours = of_hpcft(ranks, params, kills, args.spares, rng)
                print(_row(ranks, params, *ours), flush=True)
        return
    recoveries, step = of_hpcft(args.ranks, args.params, args.kills, args.spares, rng)
    print(_row(args.ranks, args.params, recoveries, step), flush=True)
    if not args.peer_kills:
        return
    peer = of_torchrun(args.ranks, args.params, args.peer_kills, rng)
    ours = median(r.total for r in recoveries)
    theirs = median(peer)
    print(
        f"\nhpcft {1000 * ours:.0f} ms, torchrun {1000 * theirs:.0f} ms "
        f"({', '.join(f'{1000 * t:.0f}' for t in peer)}): ratio {theirs / ours:.0f}"
    )


if __name__ == "__main__":
    main()
