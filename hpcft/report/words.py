"""The story of a run in plain words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hpcft.report.amounts import count, duration, listed, percent, short
from hpcft.report.goodput import Goodput
from hpcft.report.incidents import Incident
from hpcft.report.stragglers import Straggler

#: What the parts of the wall time are called; and in a sentence, where it went.
PARTS = {
    "steps": ("steps that count", "steps that count"),
    "starting": ("starting", "starting"),
    "recovery": ("recovery", "recoveries"),
    "relaunch": ("relaunch", "starting all ranks again"),
    "resize": ("resize", "going on as more or fewer"),
    "again": ("steps lost", "steps that were lost and done again"),
    "saving": ("saving", "saving at the ends of steps"),
    "waiting": ("waiting for slower ranks", "waiting for slower ranks"),
    "restart": ("between Slurm restarts", "waiting for Slurm to start the job again"),
    "ending": ("ending", "the end, after the last step"),
}
#: Each exactly, as hpcft.report.goodput defines it, for who reads the page.
MEANINGS = {
    "steps": "computing, and the waiting that no rank is spared (the transfer itself), "
    "in steps that were not lost; mean over the ranks",
    "starting": "from the launcher's begin to the first step, at the first start and each restart "
    "by Slurm",
    "recovery": "from a failure until the ranks go on in place",
    "relaunch": "from a failure until the first step after all ranks have been started again",
    "resize": "from the ranks' leaving until the first step as more or fewer",
    "again": "the first doing of steps that were lost and had to be done again",
    "saving": "at the ends of steps, for checkpoints and for leaving in order",
    "waiting": "waiting beyond that of the rank that waits least; mean over the ranks",
    "restart": "between the end of one Slurm job step and the begin of the next",
    "ending": "from the last step, or the failure that ended the run, to the end",
}
#: What part of the time must have been lost on something for it to be looked at.
_WORTH = 0.1


@dataclass(frozen=True)
class Facts:
    """What there is to tell.

    state, ended, reason, step: as of :class:`hpcft.report.record.Record`.
    first, last: how many ranks trained at first, and at last; None if training never began.
    spares: how many waited at first.
    restored: the step that the run was taken up at by its first start; None if there was none.
    restarts: by Slurm, before this run directory and those beside it.
    newest: step of the newest checkpoint; None if there is none.
    intervals: why checkpoints were made so often at last, by tier, where the run has chosen that.
    """

    state: str
    ended: bool
    reason: str
    step: int | None
    first: int | None
    last: int | None
    spares: int
    restored: int | None
    restarts: int
    newest: int | None
    goodput: Goodput
    incidents: Sequence[Incident]
    stragglers: Sequence[Straggler]
    intervals: Sequence[str] = ()


def told(facts: Facts) -> list[str]:
    """What happened, how it ended and what it cost, a sentence each."""
    said = [_end(facts)]
    said += _failures(facts)
    said += _others(facts)
    said += _cost(facts)
    said += [f"How often to save was found out: {why}." for why in facts.intervals]
    return said


def _end(facts: Facts) -> str:
    goodput, step = facts.goodput, facts.step or 0
    took = duration(goodput.whole)
    if facts.first is None:
        if not facts.ended:
            return "The run is starting: no rank has come to its training yet."
        why = f": {facts.reason}" if facts.reason else ""
        return f"The run {_PAST.get(facts.state, facts.state)} before training began{why}."
    with_spares = f" and {count(facts.spares, 'spare')}" if facts.spares else ""
    on = f"on {count(facts.first, 'rank')}{with_spares}"
    whence = f", taken up at step {facts.restored}" if facts.restored is not None else ""
    if facts.state == "ok":
        return f"The run {on}{whence} finished: it reached step {step} after {took}."
    if facts.ended:
        why = f" ({facts.reason})" if facts.reason else ""
        past = _PAST.get(facts.state, facts.state)
        return f"The run {on}{whence} {past} at step {step} after {took}{why}."
    if facts.state == "queued":
        return f"The run {on}{whence} waits in Slurm's queue to go on from step {step}."
    if facts.state == "silent":
        return (
            f"The run {on}{whence} had reached step {step} after {took} when it was last heard of; "
            "whether it still runs is not known."
        )
    return f"The run {on}{whence} is under way: step {step} after {took}."


_PAST = {
    "ok": "finished",
    "failed": "failed",
    "interrupted": "was asked to end and left",
    "killed": "was killed from outside",
}


def _failures(facts: Facts) -> list[str]:
    failures = [one for one in facts.incidents if one.kind == "failure"]
    spares = sum(one.kind == "spare failure" for one in facts.incidents)
    said = []
    if failures:
        causes = Counter(one.cause for one in failures).most_common(3)
        why = listed(
            [f"{cause}, {times(number)}" if number > 1 else cause for cause, number in causes]
        )
        took_over = sum("took over" in one.then for one in failures)
        fewer = sum(one.then.startswith("went on with") for one in failures)
        again = sum(one.then == "all ranks were started again" for one in failures)
        nothing = sum(not one.then for one in failures)
        then = [f"a spare took over {times(took_over)}"] if took_over else []
        then += [f"the others went on without it {times(fewer)}"] if fewer else []
        then += [f"{again} of them took part in a relaunch of all ranks"] if again else []
        then += ["the run did not go on"] if nothing else []
        stalls = [one.stall_s for one in failures if one.stall_s is not None]
        longest = f"; the longest stall was {short(max(stalls))}" if stalls else ""
        said.append(f"{count(len(failures), 'rank')} failed ({why}): {listed(then)}{longest}.")
    elif facts.first is not None:
        said.append("No rank failed.")
    if spares:
        said.append(f"{count(spares, 'spare')} failed while waiting, which disturbs nobody.")
    return said


def times(number: int) -> str:
    """``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _others(facts: Facts) -> list[str]:
    said = []
    kinds = Counter(one.kind for one in facts.incidents)
    swapped = sum("became a spare" in one.then for one in facts.incidents)
    if swapped:
        said.append(f"A slow rank changed places with a spare {times(swapped)}.")
    lost = sum(one.lost_steps or 0 for one in facts.incidents if one.kind == "relaunch")
    if relaunches := kinds["relaunch"]:
        went_back = f", which lost {count(lost, 'step')}" if lost else ""
        said.append(f"All ranks were started again {times(relaunches)}{went_back}.")
    if resizes := kinds["resize"]:
        said.append(f"The run was resized {times(resizes)}.")
    if restarts := kinds["restart"]:
        said.append(f"Slurm started the job again {times(restarts)}.")
    missing = facts.restarts - restarts
    if missing > 0:
        said.append(
            f"Slurm had started the job {times(missing)} before that; those run directories are "
            "not here, and not in this report."
        )
    if facts.last is not None and facts.first is not None and facts.last != facts.first:
        said.append(
            f"It trains on {count(facts.last, 'rank')} now."
            if not facts.ended
            else f"At the end {count(facts.last, 'rank')} trained."
        )
    return said


def _cost(facts: Facts) -> list[str]:
    goodput = facts.goodput
    if facts.first is None or goodput.whole <= 0:
        return []
    said = f"{percent(goodput.part)} of the time went into steps that count"
    rest = sorted(
        ((seconds, name) for name, seconds in goodput.parts.items() if name != "steps"),
        reverse=True,
    )
    most = [
        f"{PARTS[name][1]} ({percent(seconds / goodput.whole)}, {duration(seconds)})"
        for seconds, name in rest[:3]
        if seconds > 0.005 * goodput.whole
    ]
    return [f"{said}; most of the rest into {listed(most)}." if most else f"{said}."]


def _slow(stragglers: Sequence[Straggler]) -> list[str]:
    """What there is to say of the slowest three ranks, whoever played them."""
    by_rank: dict[int, list[Straggler]] = {}
    for slow in stragglers:
        by_rank.setdefault(slow.rank, []).append(slow)
    said = []
    for rank, own in list(by_rank.items())[:3]:
        worst = own[0]
        evidence = (
            f"computes {short(worst.median)} in a step, the others {short(worst.others)}, and they "
            f"wait {short(worst.others_waiting)}"
        )
        if len(own) == 1:
            said.append(
                f"Rank {rank} (process {worst.world}) {evidence}: look at its node, at what else "
                "runs there, and at its share of the data."
            )
        else:
            said.append(
                f"Rank {rank} {evidence}; so it was with each of {len(own)} processes that played "
                "it: look at its share of the work first, then at their nodes."
            )
    if len(by_rank) > 3:
        said.append(f"{len(by_rank) - 3} more ranks are slower than the others.")
    return said


def advice(facts: Facts, traceback: bool) -> list[str]:
    """What to look at, the most important first."""
    said = []
    if traceback:
        said.append("The traceback below is the last that who ended the run has left.")
    elif facts.state in ("failed", "killed"):
        if any(one.kind == "failure" for one in facts.incidents):
            said.append("See what those that failed have printed: hpcft logs RUN --failed.")
        else:
            said.append(
                "Nobody could write down why it ended: see the last lines of hpcft logs RUN, what "
                "the launcher or the batch job has printed, and whether memory ran out."
            )
    if facts.state in ("failed", "killed", "interrupted") and facts.newest is not None:
        said.append(
            f"The newest checkpoint is of step {facts.newest}: the same command goes on from there."
        )
    said += _slow(facts.stragglers)
    goodput = facts.goodput
    if goodput.whole > 0 and facts.first is not None:
        said += [
            text
            for name, text in _ADVICE.items()
            if goodput.parts[name] > _WORTH * goodput.whole
            and not (name == "waiting" and facts.stragglers)
        ]
    troubles = [one for one in facts.incidents if one.kind == "checkpoint"]
    if troubles:
        said.append(
            f"Checkpoints had trouble {times(len(troubles))}, last at step {troubles[-1].step}: "
            f"{troubles[-1].cause}."
        )
    return said


_ADVICE = {
    "waiting": "Much time goes into waiting, and no rank is slower than the others for long: the "
    "work of a step may be divided unevenly, or the machine be busy with something else.",
    "again": "Much time went into steps that were lost: save more often (--ckpt-every), or keep "
    "copies in memory (--ckpt-near).",
    "saving": "Much time goes into saving: save less often (--ckpt-every), or see what the file "
    "system does (hpcft ckpt top).",
    "relaunch": "Much time went into relaunches: more spares (--spares) heal failures in place.",
    "restart": "Much time went by until Slurm had started the job again.",
}
