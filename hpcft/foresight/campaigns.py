"""Published campaigns, to hold the simulator against.

What a publication gives is taken as it is given. A bound ("less than ten minutes") makes a range:
from the bound itself to half of it. What it does not give is taken from the published campaign
nearest in size and year, and is named as assumed. Nothing was fitted to the published goodput.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hpcft.foresight.forecast import Forecast, simulate
from hpcft.foresight.scenario import (
    DAY,
    HOUR,
    Hazards,
    Machine,
    Saves,
    Scenario,
    Site,
    Stack,
    Tier,
)

_MINUTE = 60.0
#: Every failure ends the job, which is started again from the newest file.
_RESTARTS = Stack(in_place=False, detect=0.0, relaunch=0.0, start=0.0, short="wait")


@dataclass(frozen=True)
class Campaign:
    """One.

    published: the share of effective training time, from and to; of a bound to 1.
    worse, better: the ends of the range that the given inputs leave.
    given, assumed: the inputs, in words.
    """

    name: str
    source: str
    published: tuple[float, float]
    worse: Scenario
    better: Scenario
    given: tuple[str, ...]
    assumed: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What the simulator says of one.

    difference: from the published to the nearest simulated share; 0 where the ranges meet.
    """

    campaign: Campaign
    worse: Forecast
    better: Forecast

    @property
    def difference(self) -> float:
        low, high = self.worse.part.mean, self.better.part.mean
        from_, to = self.campaign.published
        return low - to if low > to else min(0.0, high - from_)


def judge(campaign: Campaign, runs: int = 32, seed: int = 0) -> Verdict:
    """Play one through at both ends of its range."""
    worse, better = (simulate(end, runs, seed) for end in (campaign.worse, campaign.better))
    return Verdict(campaign, worse, better)


def _every(days: float, times: float) -> float:
    return days * DAY / times


def _scenario(
    nodes: int, days: float, failures: float, file: Tier, detect: float, restart: float
) -> Scenario:
    """All failures end the job, whatever node they begin on: only their number matters."""
    stack = replace(_RESTARTS, detect=detect, relaunch=restart)
    hazards = Hazards(node=math.inf, job=_every(days, failures))
    return Scenario(Machine(nodes), days * DAY, hazards, Saves(file=file), stack, Site(queue=0.0))


def _llama() -> Campaign:
    def end(part: float) -> Scenario:
        # MegaScale's 15 minutes to catch up are those of a restart and of half an interval, evenly.
        catching_up = 15 * _MINUTE * part
        file = Tier(catching_up, 0.0)
        of = _scenario(2048, 54, 419, file, 10 * _MINUTE * part, catching_up / 2)
        stack = replace(of.stack, start=catching_up)
        return replace(of, stack=stack, hazards=replace(of.hazards, preempted=_every(54, 47)))

    return Campaign(
        "Llama 3 405B",
        "Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.4",
        (0.90, 1.0),
        end(1.0),
        end(0.5),
        (
            "16,384 GPUs, 54 days",
            "419 unexpected interruptions and 47 planned ones",
            "more than 90 % effective training time",
        ),
        (
            "detection and diagnosis of up to 10 min, as MegaScale's",
            "up to 15 min from then until the progress is made up for, as MegaScale's",
            "saves hold nobody up",
        ),
    )


def _megascale() -> Campaign:
    def end(part: float) -> Scenario:
        catching_up = 15 * _MINUTE * part
        file = Tier(catching_up, 0.0)
        return _scenario(1536, 28, 100, file, 10 * _MINUTE * part, catching_up / 2)

    return Campaign(
        "MegaScale",
        "Jiang et al. 2024, arXiv:2402.15627, section 6.3",
        (0.90, 1.0),
        end(1.0),
        end(0.5),
        (
            "more than 10,000 GPUs, over 100 restarts in several weeks",
            "detection and diagnosis in less than 10 min",
            "progress made up for within 15 min from the newest checkpoint",
            "more than 90 % effective training time",
        ),
        ("several weeks are four", "12,288 GPUs", "saves hold nobody up"),
    )


def _bloom() -> Campaign:
    iteration, days = 105.3, 108.0
    done = (94_767 - 12_695) * iteration / (days * DAY)

    def end(failures_a_week: float, restart: float) -> Scenario:
        file = Tier(100 * iteration, 40.0)
        of = _scenario(48, days, failures_a_week * days / 7, file, 0.0, restart)
        # The three evaluations that hung, and were found by people.
        hung = replace(of.hazards, preempted=_every(days, 3))
        return replace(of, hazards=hung, site=Site(queue=(18 + 6 + 11) / 3 * HOUR))

    return Campaign(
        "BLOOM 176B",
        "BigScience, training chronicles of tr11-176B-ml; Le Scao et al. 2022, arXiv:2211.05100",
        # A day more or less at its ends, which are given as dates.
        (done * days / (days + 1), done * days / (days - 1)),
        end(2, 15 * _MINUTE),
        end(1, 7.5 * _MINUTE),
        (
            "48 nodes; iteration 12,695 on 2022-03-18 and 94,767 on 2022-07-04",
            "105 to 106 s for each, of which its share of the time follows",
            "1 to 2 failures of GPUs a week",
            "a save every 100 iterations, which takes 40 s",
            "three hung evaluations, which cost 18 h, 6 h and 11 h",
        ),
        ("a restart takes up to 15 min, as MegaScale's",),
    )


def _opt() -> Campaign:
    wasted = 178_000 / (992 * 24 * 60)

    def end(interval: float, restart: float) -> Scenario:
        return _scenario(124, 60, 35 + 70, Tier(interval, 40.0), 0.0, restart)

    return Campaign(
        "OPT-175B",
        "Zhang et al. 2022, arXiv:2205.01068, section 2.5; Wang et al. 2023 (Gemini, SOSP)",
        (1 - wasted, 1 - wasted),
        end(3 * HOUR, 15 * _MINUTE),
        end(1.5 * HOUR, 7.5 * _MINUTE),
        (
            "992 GPUs, two months, at least 35 manual and some 70 automatic restarts",
            "178,000 GPU-hours wasted",
        ),
        (
            "a save every 3 h or half of that, which takes 40 s, as BLOOM's",
            "a restart takes up to 15 min, as MegaScale's",
        ),
    )


def _rsc() -> Campaign:
    def end(nodes: int) -> Scenario:
        per_day = 6.5e-3 * nodes
        return _scenario(nodes, 30, 30 * per_day, Tier(HOUR, 0.0), 0.0, 5 * _MINUTE)

    return Campaign(
        "Meta RSC-1, large jobs",
        "Kokolis et al. 2025, arXiv:2410.21680",
        (0.9, 0.9),
        end(512),
        end(256),
        (
            "6.50 failures in a thousand node-days",
            "an effective training time ratio of about 0.9 for runs on more than 1024 GPUs, ...",
            "... computed by its authors with a save every 60 min and 5 min for a restart",
        ),
        ("such runs have 2048 to 4096 GPUs", "saves hold nobody up", "no wait in the queue"),
    )


#: Those whose inputs are public enough to be played through.
CAMPAIGNS = (_llama(), _megascale(), _rsc(), _opt(), _bloom())
