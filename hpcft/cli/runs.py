"""What the sub-commands about runs share: naming one, and seeing it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hpcft.ckpt.errand import Errand
from hpcft.errors import HpcftError
from hpcft.report.amounts import duration
from hpcft.watch.runs import PATIENCE, Jobs, Run
from hpcft.watch.view import View, look

RUN = """\
RUN is a run directory (hpcft-runs/...), or a run's name as `hpcft ps --all` shows it, or the number
of its Slurm job; of several runs so called the last is meant.
"""


def add_run(parser: argparse.ArgumentParser) -> None:
    """Describe the argument RUN."""
    parser.add_argument("run_name", metavar="RUN", help="run directory, name, or Slurm job")


def see_all(runs: Sequence[Run]) -> list[View]:
    """Look at runs. One whose file system does not answer does not keep the others waiting."""
    jobs = Jobs(runs)
    errands = [Errand(lambda run=run: look(run, jobs)) for run in runs]  # type: ignore[misc]
    views = []
    for run, errand in zip(runs, errands, strict=True):
        try:
            views.append(errand.result(PATIENCE))
        except (OSError, ValueError, LookupError, TypeError) as error:
            views.append(_unseen(run, error))
    return views


def see(run: Run) -> View:
    """Look at one.

    Raises
    ------
    HpcftError: it cannot be seen.
    """
    (view,) = see_all([run])
    if view.state == "no answer":
        raise HpcftError(f"{view.run_dir} cannot be read: {view.reason}")
    return view


def _unseen(run: Run, error: Exception) -> View:
    entry = run.entry
    return View(
        run.name,
        str(run.rundir.path),
        "no answer",
        0.0,
        entry.host if entry else "",
        entry.job if entry else "",
        reason=str(error),
    )


def as_json(view: View) -> dict[str, Any]:
    """What a script gets to see."""
    return asdict(view) | {"ended": view.ended, "hosts": view.hosts}


def saved(view: View) -> str:
    """The newest checkpoint in words."""
    if view.checkpoint is None:
        return ""
    return f"step {view.checkpoint.step}, {duration(view.time - view.checkpoint.time)} ago"


def rate(view: View) -> str:
    """Steps a second; from some time after the last, how long ago that was."""
    if view.ended or view.rate is None:
        return ""
    still = view.time - (view.stepped or view.time)
    if still > max(10.0, 10 / view.rate if view.rate else 0.0):
        return f"none for {duration(still)}"
    return f"{view.rate:.3g}"


def metrics(view: View) -> str:
    """What the script said of its last step."""
    known = view.metrics or {}
    return "  ".join(f"{k} {'nan' if v is None else f'{v:.4g}'}" for k, v in known.items())
