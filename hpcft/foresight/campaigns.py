"""Published campaigns, to hold the simulator against.

What a publication gives is taken as it is given. A bound ("less than ten minutes") makes a range:
from the bound itself to half of it. What it does not give is taken from the published campaign
nearest in size and year, and is named as assumed. Nothing was fitted to the published goodput.
docs/foresight.md says where each input is to be found.
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
    iterations = 94_767 - 12_695
    # From noon of 18 March, the hour of the launch a week before, to 9 pm of 4 July.
    days, unsure = 108.4, 0.5
    fast, slow = 105.16, 106.4

    def end(failures_a_week: float, restart: float, full_disks: float) -> Scenario:
        # What evaluations hold training up for is spread over the saves, of which there are ten
        # for each of them.
        file = Tier(100 * fast, 40.0 + 12 * _MINUTE / 10)
        of = _scenario(48, days, failures_a_week * days / 7, file, 0.0, restart)
        hazards = replace(
            of.hazards,
            preempted=_every(days, 5),
            slow=_every(days, 1 / 48),
            slowdown=111.0 / fast,
            slow_for=(45_000 - 42_783) * 111.0,
        )
        stopped = (18 + 6 + 11 + full_disks) / 5 * HOUR
        return replace(of, hazards=hazards, site=Site(queue=stopped))

    return Campaign(
        "BLOOM 176B",
        "BigScience, chronicles of tr11-176B-ml; Bekman 2022, The Technology Behind BLOOM Training",
        (
            iterations * fast / ((days + unsure) * DAY),
            iterations * slow / ((days - unsure) * DAY),
        ),
        end(2, 15 * _MINUTE, 20),
        end(1, 7.5 * _MINUTE, 10),
        (
            "48 nodes; iteration 12,695 on 2022-03-18 and 94,767 on 2022-07-04, 9 pm",
            "105.2 to 106.4 s for each, of which its share of the time follows",
            "1 to 2 failures of GPUs a week",
            "a save every 100 iterations, which takes 40 s",
            "an evaluation every 1000 iterations, which takes 12 min",
            "three hung evaluations, which cost 18 h, 6 h and 11 h",
            "full disks, which like these cost 5 to 10 h",
            "a slow node from iteration 42,783 to past 45,000: 111 s for each",
        ),
        ("a restart takes up to 15 min, as MegaScale's", "disks were full twice"),
    )


def _opt() -> Campaign:
    def wasted(days: float) -> float:
        return 178_000 / (992 * 24 * days)

    def end(interval: float, restart: float) -> Scenario:
        return _scenario(124, 60, 35 + 70, Tier(interval, 40.0), 0.0, restart)

    return Campaign(
        "OPT-175B",
        "Zhang et al. 2022, arXiv:2205.01068, section 2.5; chronicles; Wang et al. 2023 (Gemini)",
        # From the begin of what was to become the model, or of its forerunner, to 6 January.
        (1 - wasted(56), 1 - wasted(62)),
        end(3 * HOUR, 15 * _MINUTE),
        end(1.5 * HOUR, 7.5 * _MINUTE),
        (
            "992 GPUs, two months, at least 35 manual and some 70 automatic restarts",
            "178,000 GPU-hours wasted, say Gemini's authors; ...",
            "... its own say that it computed for 33 days on 1024 GPUs, of 56, which is 61 %",
        ),
        (
            "a save every 3 h or half of that, which takes 40 s, as BLOOM's",
            "a restart takes up to 15 min, as MegaScale's",
        ),
    )


def _of_rsc(nodes: float, interval: float, write: float) -> Scenario:
    per_day = 6.5e-3 * nodes
    return _scenario(int(nodes), 30, 30 * per_day, Tier(interval, write), 0.0, 5 * _MINUTE)


def _rsc() -> Campaign:
    return Campaign(
        "Meta RSC-1, large jobs",
        "Kokolis et al. 2025, arXiv:2410.21680v2",
        (0.9, 0.9),
        _of_rsc(512, HOUR, 5 * _MINUTE),
        _of_rsc(128, HOUR, 5 * _MINUTE),
        (
            "6.50 failures in a thousand node-days",
            "an effective training time ratio of around 0.9 for runs on more than 1024 GPUs, ...",
            "... taken from their jobs' times, for a save every 60 min, ...",
            "... which holds training up for 5 min, and 5 min for a restart",
            "the largest such runs have 4096 GPUs",
        ),
        ("no wait in the queue",),
    )


def _all_of_rsc(minutes: float, published: tuple[float, float], said: str) -> Campaign:
    of = _of_rsc(2000, minutes * _MINUTE, 0.0)
    return Campaign(
        f"Meta RSC-1 as one run, a save every {minutes:g} min",
        "Kokolis et al. 2024, arXiv:2410.21680v1",
        published,
        of,
        of,
        (
            "16,000 GPUs, 6.50 failures in a thousand node-days, 5 min for a restart",
            "saves hold nobody up",
            f"an expected ratio of {said}, computed by its authors",
        ),
        (),
    )


def _byterobust() -> Campaign:
    restarts = 128 + 20 + 15 + 12

    def end(detect: float, restart: float) -> Scenario:
        return _scenario(1200, 91, restarts, Tier(60.0, 0.0), detect, restart)

    return Campaign(
        "ByteRobust, dense model",
        "Wan et al. 2025, arXiv:2509.16293v4, section 8.1, tables 3, 4 and 6",
        (0.97, 0.97),
        end(10 * _MINUTE, 10 * _MINUTE),
        end(30.0, 93.0),
        (
            "9,600 GPUs, three months, 175 incidents",
            "detected in 2 to 60 s where that is inspected, else after 10 min",
            "restarted after 93 s more, in the mean of the most frequent kind, ...",
            "... and after 10 min at most, but for those that show as NaN",
            "a checkpoint in memory each step, which holds nobody up",
            "an effective training time ratio of up to 97 %",
        ),
        ("a step takes up to 1 min", "NaNs are rare"),
    )


#: Those whose inputs are public enough to be played through.
CAMPAIGNS = (
    _llama(),
    _megascale(),
    _byterobust(),
    _rsc(),
    _all_of_rsc(60, (0.65, 0.75), "0.7"),
    _all_of_rsc(5, (0.925, 0.935), "0.93"),
    _opt(),
    _bloom(),
)
