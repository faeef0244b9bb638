"""A run's figures as Prometheus has them, made from what is in its run directory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hpcft.ckpt.errand import Errand
from hpcft.telemetry.events import Event, cold_now, slow_now
from hpcft.telemetry.laps import Tally
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise

#: Of a metric, by the labels besides the run.
Values = Mapping[tuple[str, ...], float]

_STATES = ("starting", "training", "ok", "interrupted", "failed")
#: Seconds that a collection waits for the file system.
_PATIENCE = 10.0


def families(name: str, rundir: RunDirectory, tally: Tally) -> list[Metric]:
    """All metrics of a run as they are now.

    Parameters
    ----------
    name: the run's; a label of every sample, so that those of several runs go into one place.
    tally: of the run's laps; is renewed.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError: the run directory cannot be read.
    """
    # In this order: what is there later is true of what was read earlier, too.
    status, events = rundir.status(), rundir.events()
    table, summary = rundir.ranks(), rundir.summary()
    tally.renew()
    told = summary or summarise(events)
    make = _Families(name)
    return [
        *_progress(make, status, events, summary, tally),
        *_ranks(make, table, events, summary is not None),
        *_failures(make, told["failures"], events),
        *_stragglers(make, events, summary is not None),
        *_checkpoints(make, events),
        *_evaluations(make, events),
        *_times(make, tally),
        *_own(make, status),
    ]


class RunCollector(Collector):
    """What a registry of Prometheus's library collects a run's metrics with.

    A run directory that cannot be read, or not now, is a metric as well.
    """

    def __init__(self, name: str, rundir: RunDirectory) -> None:
        self._name = name
        self._rundir = rundir
        self._tally = Tally(rundir.laps_folder)
        self._reading: Errand[list[Metric]] | None = None

    def read(self) -> list[Metric]:
        """All metrics; waits for a file system that does not answer only so long.

        Raises
        ------
        OSError, ValueError, LookupError, TypeError: the run directory cannot be read.
        """
        if self._reading and not self._reading.done:
            raise TimeoutError("it is still being read for another request")
        self._reading = Errand(lambda: families(self._name, self._rundir, self._tally))
        return self._reading.result(_PATIENCE)

    def collect(self) -> Iterable[Metric]:
        try:
            found = self.read()
        except (OSError, ValueError, LookupError, TypeError):
            found = []
        text = "Whether the run directory could be read; if not there are no other metrics."
        return [_Families(self._name).gauge("readable", text, bool(found)), *found]

    def describe(self) -> Iterable[Metric]:
        # Else registering would collect, when there may be nothing to read yet.
        return []


def kind_of(cause: str) -> str:
    """A cause without what differs from case to case: labels are to be few.

    ``exit code 1: ValueError: bad`` is of the kind ``exit code 1``, ``node n3 lost`` of ``node
    lost``.
    """
    text = re.sub(r"^node \S+", "node", cause.partition(":")[0])
    return re.sub(r" for [\d.]+ s$", "", text) or "unknown"


class _Families:
    """Makes families of samples, all with the run's name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"hpcft_{name}", text, labels=["run"])
        family.add_metric([self._name], value)
        return family

    def counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"hpcft_{name}", text, labels=["run"])
        family.add_metric([self._name], value)
        return family

    def summary(self, name: str, text: str, values: Iterable[float]) -> Metric:
        values = list(values)
        family = SummaryMetricFamily(f"hpcft_{name}", text, labels=["run"])
        family.add_metric([self._name], len(values), sum(values))
        return family

    def gauges(self, name: str, text: str, labels: list[str], values: Values) -> Metric:
        family = GaugeMetricFamily(f"hpcft_{name}", text, labels=["run", *labels])
        for key, value in values.items():
            family.add_metric([self._name, *key], value)
        return family

    def counters(self, name: str, text: str, labels: list[str], values: Values) -> Metric:
        family = CounterMetricFamily(f"hpcft_{name}", text, labels=["run", *labels])
        for key, value in values.items():
            family.add_metric([self._name, *key], value)
        return family


def _progress(
    make: _Families,
    status: dict[str, Any] | None,
    events: list[Event],
    summary: dict[str, Any] | None,
    tally: Tally,
) -> Iterator[Metric]:
    state = summary["result"] if summary else "training" if status or events else "starting"
    yield make.gauges(
        "run_state",
        "What the run does, or how it has ended: 1 for the one that is true.",
        ["state"],
        {(one,): float(one == state) for one in _STATES},
    )
    if summary:
        step = summary["steps"]
    else:
        step = status["step"] if status else max((event.step for event in events), default=0)
    yield make.gauge("step", "Steps completed; falls when the run goes back to a checkpoint.", step)
    first = tally.by_rank.get(0)
    yield make.counter(
        "steps_done",
        "Steps that rank 0 has done, those done again included; counted lap by lap, and so up to "
        "a minute late.",
        first.steps if first else 0,
    )
    if status:
        running = summary is None
        yield make.gauge(
            "steps_per_second",
            "Steps a second over the last ten seconds.",
            (status["rate"] or 0.0) if running else 0.0,
        )
        yield make.gauge(
            "status_timestamp_seconds",
            "When the run last wrote how far it is, which it does every second; since 1970.",
            status["time"],
        )
        yield make.gauge(
            "last_step_timestamp_seconds",
            "When the last step was completed; since 1970.",
            status["stepped"],
        )
    if start := next((event for event in events if event.kind == "start"), None):
        yield make.gauge("start_timestamp_seconds", "When training began; since 1970.", start.time)


def _ranks(
    make: _Families, table: list[dict[str, Any]], events: list[Event], ended: bool
) -> Iterator[Metric]:
    roles = Counter(entry["role"] for entry in table if not ended)
    spares = {entry["world"] for entry in table if entry["role"] == "spare" and not ended}
    yield make.gauge("ranks_training", "Ranks that train.", roles["active"])
    yield make.gauge("spares_left", "Spares that wait.", roles["spare"])
    yield make.gauge(
        "spares_cold",
        "Those of them that have given their memory back, and take longer to take over.",
        len(spares & cold_now(events)),
    )


def _stragglers(make: _Families, events: list[Event], ended: bool) -> Iterator[Metric]:
    slow = {} if ended else slow_now(events)
    yield make.gauges(
        "process_slow",
        "Of each process that computes lastingly longer than the others, how many times as long; "
        "spares that were slow included.",
        ["process", "host"],
        {
            (str(world), str(event.detail["host"])): event.detail["factor"]
            for world, event in slow.items()
        },
    )
    kinds = Counter(event.kind for event in events)
    yield make.counter("stragglers", "Times a process was found slow.", kinds["straggler"])
    text = "Times a slow process has changed places with a spare."
    yield make.counter("replacements", text, kinds["replaced"])


def _failures(
    make: _Families, failures: list[dict[str, Any]], events: list[Event]
) -> Iterator[Metric]:
    counted: Counter[tuple[str, ...]] = Counter(
        (kind_of(each["cause"]), str(each["action"])) for each in failures
    )
    yield make.counters(
        "failures",
        "Processes that have failed, by the cause and by what was done about it: substitute, "
        "shrink, or none.",
        ["cause", "action"],
        counted,
    )
    resumed = [event.detail for event in events if event.kind == "resume"]
    yield make.summary(
        "recovery_seconds",
        "Recoveries in place, and the time from the beginning of each to its end.",
        (detail["recover_s"] for detail in resumed),
    )
    yield make.summary(
        "stall_seconds",
        "Recoveries, and the time from the failure to the next completed step.",
        (event.detail["stall_s"] for event in events if event.kind == "recovered"),
    )
    yield make.counter(
        "lost_steps",
        "Steps lost to failures, and so done again.",
        sum(detail["lost_steps"] or 0 for detail in resumed),
    )
    kinds = Counter(event.kind for event in events)
    yield make.counter("relaunches", "Times all ranks were started again.", kinds["relaunch"])
    yield make.counter(
        "resizes", "Times the ranks went on as more or fewer, as workers joined or left.",
        kinds["resize"],
    )  # fmt: skip


def _checkpoints(make: _Families, events: list[Event]) -> Iterator[Metric]:
    saved = [event for event in events if event.kind == "checkpoint"]
    kinds = Counter(event.kind for event in events)
    yield make.counters(
        "checkpoints",
        "Checkpoints by what has become of them: committed, failed, or skipped.",
        ["result"],
        {
            ("committed",): len(saved),
            ("failed",): kinds["save failed"],
            ("skipped",): kinds["save skipped"],
        },
    )
    yield make.summary(
        "checkpoint_seconds",
        "Committed checkpoints, and the time each took to be written, mostly in the background.",
        (event.detail["seconds"] for event in saved),
    )
    if saved:
        yield make.gauge(
            "last_checkpoint_step", "Step of the newest committed checkpoint.", saved[-1].step
        )
        yield make.gauge(
            "last_checkpoint_timestamp_seconds",
            "When the newest checkpoint was committed, since 1970; its age is time() less this.",
            saved[-1].time,
        )


def _evaluations(make: _Families, events: list[Event]) -> Iterator[Metric]:
    found = [event for event in events if event.kind == "evaluation"]
    if not found:
        return
    newest = max(found, key=lambda event: (event.step, event.time))
    yield make.gauges(
        "validation_metric",
        "What a spare has found of the newest checkpoint that was evaluated, by name.",
        ["name"],
        {(name,): value for name, value in newest.detail["metrics"].items()},
    )
    yield make.gauge("last_evaluation_step", "Step of that checkpoint.", newest.step)
    yield make.summary(
        "evaluation_seconds",
        "Evaluations by spares, and the time that each took.",
        (event.detail["seconds"] for event in found),
    )


def _times(make: _Families, tally: Tally) -> Iterator[Metric]:
    values: dict[tuple[str, ...], float] = {}
    for rank, spent in sorted(tally.by_rank.items()):
        values[str(rank), "computing"] = spent.compute
        values[str(rank), "waiting"] = spent.waiting
        values[str(rank), "saving"] = spent.saving
    yield make.counters(
        "rank_seconds",
        "Seconds each rank has spent computing, waiting for others, and saving; counted lap by "
        "lap, and so up to a minute late.",
        ["rank", "spent"],
        values,
    )


def _own(make: _Families, status: dict[str, Any] | None) -> Iterator[Metric]:
    metrics: dict[str, float | None] = status["metrics"] if status else {}
    values: dict[tuple[str, ...], float] = {
        (k,): float("nan") if v is None else v for k, v in metrics.items()
    }
    yield make.gauges(
        "metric",
        "What the script has given the last step's state.commit(), by name.",
        ["name"],
        values,
    )
