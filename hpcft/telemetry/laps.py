"""How the ranks spend their steps: one JSON object a lap in ``laps/rank-<world rank>.jsonl``.

A lap is some steps in a row of one process, of the same membership. Laps are short at first and
grow with the time that a process has trained, up to a minute, so that a run of seconds can be
looked at closely and one of weeks leaves some megabytes a rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hpcft.telemetry.folder import make_folder

#: Buckets of a histogram to each doubling of the time: 9 % from one to the next.
_TO_A_DOUBLING = 8
_NAME = re.compile(r"rank-\d+\.jsonl")


def bucket(seconds: float) -> int:
    """The bucket that a time falls into."""
    return math.floor(_TO_A_DOUBLING * math.log2(max(seconds, 1e-9)))


def middle(number: int) -> float:
    """The time in the middle of a bucket, in seconds."""
    return float(2 ** ((number + 0.5) / _TO_A_DOUBLING))


def quantile(buckets: Mapping[int, int], part: float) -> float:
    """The time that so large a part of a histogram is below, in seconds; 0 if it is empty.

    In a bucket the times are taken to be spread evenly.
    """
    wanted = part * sum(buckets.values())
    for number in sorted(buckets):
        count = buckets[number]
        if 0 < count >= wanted:
            return float(2 ** ((number + max(wanted, 0) / count) / _TO_A_DOUBLING))
        wanted -= count
    return 0.0


@dataclass(frozen=True)
class Lap:
    """Some steps of one process.

    world: the process's number in its launch, as in the names of logs.
    rank: its logical rank.
    epoch: the membership's epoch in that launch.
    first, last: numbers of the first step and the last; a step has the number that ``state.step``
        has when it is committed.
    began, ended: seconds since 1970.
    compute: seconds that went on neither of the following, all steps together.
    waiting: seconds inside collectives and other calls that may wait for another rank.
    saving: seconds at the end of steps, for checkpoints and for leaving in order.
    buckets: number of steps by the :func:`bucket` of their ``compute``, those it was late for
        included.
    metrics: what the script has given the last step's ``state.commit``.
    missed: steps from first to last that others have made without it.
    late: how often its gradients came too late for the step that they were for.
    """

    world: int
    rank: int
    epoch: int
    first: int
    last: int
    began: float
    ended: float
    compute: float
    waiting: float
    saving: float
    buckets: dict[int, int]
    metrics: dict[str, float] = field(default_factory=dict)
    missed: int = 0
    late: int = 0

    @property
    def steps(self) -> int:
        return self.last - self.first + 1 - self.missed


def append(folder: Path, laps: Iterable[Lap]) -> None:
    """Add laps to their processes' files.

    Raises
    ------
    OSError: they cannot be written.
    """
    make_folder(folder)
    for lap in laps:
        text = json.dumps(asdict(replace(lap, metrics=_finite(lap.metrics))))
        with open(folder / f"rank-{lap.world}.jsonl", "a", encoding="utf-8") as file:
            file.write(text + "\n")


def read(folder: Path) -> list[Lap]:
    """All laps of a run in the order of their ends; none if there are none.

    A line that was cut short, by a full disk or the process's death, is passed over.
    """
    laps = [lap for file in folder.glob("rank-*.jsonl") for lap in _of_file(file)]
    return sorted(laps, key=lambda lap: lap.ended)


def by_process(folder: Path) -> Iterator[Iterator[Lap]]:
    """The laps of a run, process by process, each in the order of its ends.

    So who sums them up needs no memory for all of them, which of a large run are many.
    """
    for file in sorted(folder.glob("rank-*.jsonl")):
        yield _of_file(file)


def _of_file(file: Path) -> Iterator[Lap]:
    if _NAME.fullmatch(file.name):
        with file.open("rb") as lines:
            yield from _parsed(lines)


def _parsed(lines: Iterable[bytes]) -> Iterator[Lap]:
    for line in lines:
        try:
            content = json.loads(line)
            content["buckets"] = {int(key): count for key, count in content["buckets"].items()}
            yield Lap(**content)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue


@dataclass
class Spent:
    """What a logical rank's laps come to, whoever has played it.

    steps: number of steps, those that were done again included.
    compute, waiting, saving: as in :class:`Lap`, in seconds.
    """

    steps: int = 0
    compute: float = 0.0
    waiting: float = 0.0
    saving: float = 0.0


class Tally:
    """The sums of a run's laps by logical rank, renewed as laps are added.

    A renewal reads what has been added, for the laps of a long run are many.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.by_rank: dict[int, Spent] = {}

    def renew(self) -> None:
        """Read what has been added.

        Raises
        ------
        OSError: it cannot be read.
        """
        sizes = {
            file: file.stat().st_size
            for file in self._folder.glob("rank-*.jsonl")
            if _NAME.fullmatch(file.name)
        }
        if any(sizes.get(file, 0) < read for file, read in self._read.items()):
            # Another run has begun in the same directory.
            self._read, self.by_rank = {}, {}
        for file, size in sizes.items():
            if size > self._read.get(file, 0):
                self._add(file)

    def _add(self, file: Path) -> None:
        with file.open("rb") as opened:
            begin = self._read.get(file, 0)
            opened.seek(begin)
            added = opened.read()
        # The rest of a line may be yet to come.
        whole = added[: added.rfind(b"\n") + 1]
        self._read[file] = begin + len(whole)
        for lap in _parsed(whole.splitlines()):
            spent = self.by_rank.setdefault(lap.rank, Spent())
            spent.steps += lap.steps
            spent.compute += lap.compute
            spent.waiting += lap.waiting
            spent.saving += lap.saving


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """Without what JSON cannot say."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
