"""``hpcft chaos``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpcft.chaos import campaign, notes, schedule, verdict
from hpcft.chaos.campaign import Campaign
from hpcft.chaos.schedule import KINDS, Kind, Order
from hpcft.chaos.verdict import Verdict
from hpcft.cli.ckpt import targets, verify
from hpcft.cli.output import Column, print_json, say, table
from hpcft.cli.runs import RUN, add_run, see
from hpcft.errors import HpcftError, UsageError
from hpcft.watch.runs import Run, find

SUMMARY = "harm a training on purpose, and see what it does about it"

DESCRIPTION = f"""\
Do faults to a training that runs, undo them, and judge what it did about them.

    hpcft chaos RUN --rate 6/h --for 10m --seed 7           kills, hangs and slow ranks at random
    hpcft chaos RUN --rate 2/m --for 5m --faults kill       one kind alone
    hpcft chaos RUN --schedule faults.txt --expect recover  these, and no start of all ranks
    hpcft chaos RUN --schedule faults.txt --dry-run         only show what would be done
    hpcft chaos --undo RUN                                  what a killed hpcft chaos has left

A schedule has a line for each fault: when (after the begin), what, to whom, and how:

    10s  kill                    # any rank that trains: SIGKILL
    20s  kill     spare          # a spare
    30s  hang     rank=1 for=5s  # SIGSTOP for so long
    40s  slow     rank=0 for=20s factor=3      # takes three times as long, by SIGSTOP and SIGCONT
    70s  node     host=n2        # all ranks on a host, and their shepherds
    80s  cut      host=n3 for=10s              # from the run's other hosts; needs root
    90s  lossy    host=n3 for=20s percent=5    # so many packets are lost; needs root and nft
    2m   memory   rank=2 for=10s percent=80    # of what its control group, or the host, has free
    3m   corrupt  for=1m         # wrong bytes in the last checkpoint but one; newest: in that
    4m   full     for=20s        # no room where checkpoints are; needs --yes
    5m   slow-disk rank=0 for=20s mbps=5       # needs root and control groups
    6m   clock    host=n2 for=10s jump=3600    # seconds; needs root and --yes

{RUN}"""

_EPILOG = """\
What is done can be undone, and is: when its time is over, at Ctrl-C and SIGTERM, and when hpcft
chaos is killed; what then is left all the same is noted in RUN/chaos/, for --undo. What cannot be
done here, or not be undone, is refused, with the reason, and the rest of the schedule goes on. Each
fault is an event in events.jsonl, and in `hpcft report`.

exit code: 0 PASS; 1 FAIL: the run, or a checkpoint, is not as --expect wants it; 2 wrong use, or
there is no such run; 130 Ctrl-C: all is undone, and nothing judged
"""

#: What comes at random if that is not said: what needs neither root nor --yes, and no checkpoints.
_FAULTS: tuple[Kind, ...] = ("kill", "hang", "slow")
#: What others on the host feel as well.
_DANGEROUS: tuple[Kind, ...] = ("full", "clock")
_LOOK = 0.2
#: Seconds after a fault in which the run comes to tell what it did: causes are waited for.
_TOLD = 6.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add_run(parser)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--schedule", type=Path, metavar="FILE", help="do the faults in FILE")
    what.add_argument(
        "--rate", metavar="N/h", help="do faults at random, so many an hour (/h) or minute (/m)"
    )
    what.add_argument("--undo", action="store_true", help="undo what was left, and nothing else")
    add("--for", dest="length", metavar="TIME", help="with --rate: so long, as 10m")
    add(
        "--seed",
        type=int,
        default=0,
        help="of what is drawn: the times and kinds of --rate, and whom a fault hits where that is "
        "not said; the same seed draws the same (default 0)",
    )
    add(
        "--faults",
        metavar="LIST",
        help=f"with --rate: of these, separated by commas (default {','.join(_FAULTS)}); there are "
        f"{', '.join(KINDS)}",
    )
    add(
        "--expect",
        choices=("survive", "recover"),
        default="survive",
        help="survive: in the end it trains, or has finished; recover: and all ranks were never "
        "started again (default survive)",
    )
    add(
        "--settle",
        default="60s",
        metavar="TIME",
        help="so long the run may take to recover from the last fault (default 60s)",
    )
    add(
        "--ckpt-dir",
        type=Path,
        metavar="DIR",
        help="where its checkpoints are (default: as its events have it)",
    )
    add(
        "--yes",
        action="store_true",
        help="do also what others on the host feel: a full disk, another time of day, all memory; "
        "and node, where the run has no other",
    )
    add(
        "--shared-disk",
        action="store_true",
        help="with --yes: fill also a file system that other hosts may use",
    )
    add("--dry-run", action="store_true", help="show what would be done, and end")
    add("--json", action="store_true", help="print the verdict, or the schedule, as JSON")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    run = find(args.run_name)
    tell = _quiet if args.json else _tell
    if args.undo:
        return _undo(run, tell)
    orders = _orders(args)
    settle = schedule.seconds("--settle", args.settle)
    if args.dry_run:
        if args.json:
            print_json([asdict(order) for order in orders])
        else:
            say("\n".join(order.text for order in orders))
        return 0
    view = see(run)
    if view.state != "training":
        raise UsageError(f"{view.name} does not train: it is {view.state}", "see `hpcft ps`")
    if any(notes.left(run.rundir.path)):
        raise UsageError(
            "something is left to be undone, or another hpcft chaos is at it",
            f"hpcft chaos --undo {args.run_name}",
        )
    checkpoints = str(args.ckpt_dir.absolute()) if args.ckpt_dir else view.checkpoints
    signal.signal(signal.SIGTERM, _ended)
    chaos = Campaign(run, checkpoints, args.yes, args.shared_disk, args.seed, tell)
    chaos.carry_out(orders)
    tell("all is over; waiting for the run")
    _settle(chaos, run, settle)
    found = _judge(chaos, run, args, checkpoints)
    if args.json:
        print_json([asdict(found)])
    else:
        _show(found)
    return 0 if found.passed else 1


def _orders(args: argparse.Namespace) -> list[Order]:
    if args.schedule:
        for name in ("length", "faults"):
            if getattr(args, name):
                raise UsageError("--for and --faults are for --rate", "leave them away")
        try:
            text = args.schedule.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{args.schedule} cannot be read: {error}") from error
        orders = schedule.parse(text, str(args.schedule))
    else:
        if not args.length:
            raise UsageError("--rate needs to know for how long", "give --for 10m")
        names = (args.faults or ",".join(_FAULTS)).split(",")
        kinds = [schedule.kind(name.strip()) for name in names]
        length = schedule.seconds("--for", args.length)
        orders = schedule.draw(schedule.rate(args.rate), length, kinds, args.seed)
        if not orders:
            raise UsageError(
                f"at that rate none comes within {args.length}, with this seed",
                "give more of --rate, --for, or another --seed",
            )
    dangerous = {order.kind for order in orders} & set(_DANGEROUS)
    if dangerous and not (args.yes or args.dry_run):
        raise UsageError(
            f"all on the host would feel {' and '.join(sorted(dangerous))}", "say --yes"
        )
    return orders


def _settle(chaos: Campaign, run: Run, patience: float) -> None:
    """Wait until the run has answered all faults, and trains, or has ended."""
    deadline = time.monotonic() + patience
    last = max((deed.step for deed in chaos.deeds if deed.done is not None), default=-1)
    told = max((deed.done for deed in chaos.deeds if deed.done), default=0.0) + _TOLD
    while time.monotonic() < deadline and not chaos.over:
        answered = verdict.settled(chaos.deeds, run.rundir.events())
        if time.time() > told and answered and chaos.step > last and see(run).state == "training":
            return
        time.sleep(_LOOK)


def _judge(chaos: Campaign, run: Run, args: argparse.Namespace, checkpoints: str) -> Verdict:
    view = see(run)
    events = run.rundir.events()
    found = list(_verified(Path(checkpoints))) if checkpoints else []
    return verdict.judge(chaos.deeds, events, args.expect, view.state, view.step or 0, found)


def _verified(directory: Path) -> Iterator[dict[str, Any]]:
    from hpcft.ckpt._engine import Engine

    engine = Engine(targets.MEMORY)
    try:
        files = targets.files(directory)
    except HpcftError:
        return
    for file in files:
        said, _ = verify.examine(file, engine, False)
        # The run goes on, and may have given it up for a newer one meanwhile.
        if said["ok"] or file.exists():
            yield said


def _show(found: Verdict) -> None:
    rows = found.findings
    say(
        table(
            [
                Column("fault", [one.order for one in rows]),
                Column("to", [one.who for one in rows], 3),
                Column("at step", [str(one.step) if one.time else "" for one in rows], 2),
                Column("the run", [one.answer for one in rows]),
                Column(
                    "next step after",
                    ["" if one.recovery_s is None else f"{one.recovery_s:.2f} s" for one in rows],
                ),
                Column("", [one.detail for one in rows], 4),
            ]
        )
    )
    good = sum(bool(one["ok"]) for one in found.checkpoints)
    if found.checkpoints:
        say(f"checkpoints: {good} of {len(found.checkpoints)} are good")
    say(f"the run: {found.state}, step {found.step}")
    for reason in found.reasons:
        say(reason)
    say("PASS" if found.passed else "FAIL")


def _undo(run: Run, tell: Any) -> int:
    if campaign.undo(run, tell):
        tell("nothing is left to be undone")
        return 0
    raise HpcftError("something could not be undone", f"see {run.rundir.path / 'chaos'}")


def _ended(number: int, _: object) -> None:
    sys.exit(128 + number)


def _tell(text: str) -> None:
    print(f"hpcft: {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _quiet(text: str) -> None:
    """Who wants JSON gets nothing else."""
