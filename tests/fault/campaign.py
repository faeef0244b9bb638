"""Random faults over many runs: every run must end as it should, and none may hang.

``python tests/fault/campaign.py --faults 1000 --seed 7`` draws plans from the seed (how many ranks
and spares, which faults, at which steps and moments), carries them out and judges each run by what
it left. A run that fails is printed with its plan, and with the option that repeats it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import STRIDE, Training, family, undisturbed

from hpcft.world.progress import shepherd_of

_KINDS = ("kill", "double kill", "kill in recovery", "stop", "stop and kill", "spare", "shepherd")
_WEIGHTS = (4, 2, 4, 3, 1, 1, 1)
_TWO_BLOWS = ("double kill", "kill in recovery", "stop and kill")
#: A run takes some ten seconds; one that takes this long hangs.
_PATIENCE = 120.0
#: A recovery takes a tenth of this, or, when a process was stopped, somewhat less than this.
_RECOVERY_TIME = 1.0


@dataclass(frozen=True)
class Fault:
    """Something done to a run.

    kind: one of the kinds above.
    step: it happens when somebody has completed this step...
    delay: ...and so many seconds have passed: in any phase of a step.
    victims: places in the list of active ranks; two for the kinds that hit two.
    gap: seconds between the two blows, or between SIGSTOP and SIGCONT.
    """

    kind: str
    step: int
    delay: float
    victims: tuple[int, int]
    gap: float


@dataclass(frozen=True)
class Plan:
    """A run and its faults."""

    seed: str
    nproc: int
    spares: int
    shrink: bool
    faults: tuple[Fault, ...]

    @property
    def steps(self) -> int:
        return STRIDE * (len(self.faults) + 1)

    @property
    def options(self) -> list[str]:
        ways = "substitute,shrink" if self.shrink else "substitute"
        return f"--nproc {self.nproc} --spares {self.spares} --on-failure {ways}".split()

    @property
    def program(self) -> list[str]:
        return ["--steps", str(self.steps), "--pace", "0.005"]


def draw(seed: str) -> Plan:
    """The plan that follows from ``seed``."""
    rng = random.Random(seed)
    nproc, spares = rng.randint(2, 4), rng.randint(0, 8)
    shrink = rng.random() < 0.4
    # As much as can be borne, or less, sometimes more.
    blows = max(1, spares + rng.randint(-3, nproc - 1 if shrink else 1))
    faults: list[Fault] = []
    while blows > 0:
        kind = rng.choices(_KINDS, _WEIGHTS)[0]
        blows -= 2 if kind in _TWO_BLOWS else 1
        first = rng.randrange(nproc)
        gap = rng.uniform(0, 1.5) if kind.startswith("stop") else rng.expovariate(100)
        faults.append(
            Fault(
                kind,
                STRIDE * (len(faults) + 1) + rng.randint(-5, 5),
                rng.uniform(0, 0.03),
                (first, (first + rng.randrange(1, nproc)) % nproc),
                gap,
            )
        )
    return Plan(seed, nproc, spares, shrink, tuple(faults))


class Run:
    """A plan being carried out in ``path``."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan = plan
        self.training = Training(path / "run", plan.options)
        self.training.program = [self.training.program[0], *plan.program]
        #: When processes were hit, whether or not they died of it.
        self.blows: list[float] = []
        self.ending = "hung"

    def carry_out(self) -> str:
        """Run, harm, judge.

        Returns
        -------
        What is wrong; empty if all is as it should be.
        """
        training = self.training.start()
        try:
            for fault in self.plan.faults:
                if not self._reach(fault.step):
                    break
                time.sleep(fault.delay)
                self._harm(fault)
            try:
                code = training.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                return f"hangs: {training.events()}"
            return self._judge(code) or self._leftovers()
        finally:
            training.stop()

    def _reach(self, step: int) -> bool:
        deadline = time.monotonic() + _PATIENCE
        while self.training.step() < step:
            if self.training.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    @property
    def hit(self) -> int:
        """How many processes were hit."""
        return len(self.blows)

    def _most_at_once(self) -> int:
        """The most that were hit before a recovery from the first of them can be over."""
        return max(
            (sum(0 <= b - a < _RECOVERY_TIME for b in self.blows) for a in self.blows), default=0
        )

    def _hit(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            self.blows.append(time.monotonic())

    def _harm(self, fault: Fault) -> None:
        ranks = self.training.ranks()
        active = [entry["pid"] for entry in ranks if entry["role"] == "active"]
        spares = [entry["pid"] for entry in ranks if entry["role"] == "spare"]
        first, second = (active[place % len(active)] for place in fault.victims)
        if fault.kind == "spare":
            first = spares[0] if spares else first
        if fault.kind == "shepherd":
            first = shepherd_of(first) or first
        stop = fault.kind.startswith("stop")
        self._hit(first, signal.SIGSTOP if stop else signal.SIGKILL)
        if fault.kind == "kill in recovery":
            time.sleep(fault.gap)
        if fault.kind in _TWO_BLOWS and second != first:
            self._hit(second, signal.SIGKILL)
        if stop:
            time.sleep(fault.gap)
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGCONT)

    def _judge(self, code: int) -> str:
        file = self.training.run_dir / "summary.json"
        if not file.exists():
            return f"exit code {code} and no summary"
        summary: dict[str, Any] = json.loads(file.read_text())
        plan, dead = self.plan, len(summary["failures"])
        launched = plan.nproc + plan.spares
        if dead > self.hit:
            return f"{self.hit} processes were hit and {dead} failed"
        self.ending = "clear error"
        # What is left of the script once training is over is the script's own affair.
        late = "after the training was over" in self.training.output and dead < self.hit
        if code == 0 or (summary["result"] == "ok" and late):
            world = summary["world"]
            self.ending = "finished smaller" if world["final"] < plan.nproc else "finished"
            if summary["result"] != "ok" or summary["steps"] != plan.steps:
                return f"exit code {code} with {summary}"
            if world["final"] == plan.nproc:
                if summary["params_sha256"] != undisturbed(plan.nproc)[plan.steps]:
                    return "the parameters are not those of an undisturbed run"
            elif not plan.shrink:
                return "it has shrunk and must not"
            said = re.findall(r"digest ([0-9a-f]{64})", self.training.logs())
            if (len(said) != world["final"] and not late) or set(said) - {summary["params_sha256"]}:
                return f"the ranks' parameters differ: {said}"
            if world["final"] + world["spares_left"] != launched - dead:
                return f"{world} after {dead} failures"
            return ""
        if summary["result"] != "failed" or not summary["reason"]:
            return f"exit code {code} with {summary}"
        reason = summary["reason"]
        borne = (
            ("no spare is left" in reason and self.hit <= plan.spares)
            # All that trained, and with them all copies of the state.
            or ("no survivor" in reason and self._most_at_once() < plan.nproc)
            or (code != 3 and self.hit < launched)
        )
        return f"exit code {code} after {self.hit} hits: {reason}" if borne else ""

    def _leftovers(self) -> str:
        deadline = time.monotonic() + 5
        while left := family(self.training.run_dir):
            if time.monotonic() > deadline:
                return f"processes {left} are left"
            time.sleep(0.05)
        return ""


def campaign(faults: int, seed: int) -> Iterator[tuple[Run, str]]:
    """Carry out plans until so many faults have been tried; yields each run and its verdict."""
    tried = number = 0
    while tried < faults:
        plan = draw(f"{seed}.{number}")
        yield carry_out(plan)
        tried += len(plan.faults)
        number += 1


def carry_out(plan: Plan) -> tuple[Run, str]:
    """One run; what it leaves is kept if anything is wrong with it."""
    path = Path(tempfile.mkdtemp(prefix="hpcft-campaign-"))
    run = Run(plan, path)
    verdict = run.carry_out()
    if verdict:
        verdict += f"\n{plan}\nrepeat: {sys.argv[0]} --only {plan.seed}\nsee {path}"
    else:
        shutil.rmtree(path)
    return run, verdict


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", metavar="SEED.NUMBER", help="repeat this run")
    args = parser.parse_args()
    if args.only:
        runs: Iterator[tuple[Run, str]] = iter([carry_out(draw(args.only))])
    else:
        runs = campaign(args.faults, args.seed)
    print(f"seed {args.seed}", flush=True)
    kinds: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    wrong = 0
    for run, verdict in runs:
        kinds.update(fault.kind for fault in run.plan.faults)
        code = run.training.process.returncode
        endings[run.ending] += 1
        wrong += bool(verdict)
        print(f"run {run.plan.seed}: exit code {code}, {verdict or 'as it should be'}", flush=True)
    print(f"{kinds.total()} faults in {endings.total()} runs: {dict(kinds)}")
    print(f"{dict(endings)}; {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
