"""Telling the user's other commands, `hpcft ps` and its like, where a run is."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from hpcft.ckpt.errand import Errand
from hpcft.launch.options import RunOptions
from hpcft.slurm.step import find_step
from hpcft.telemetry import registry
from hpcft.telemetry.registry import Entry

#: Seconds for which a run waits for the home directory.
_PATIENCE = 2.0


def register(options: RunOptions, argv: list[str], environ: Mapping[str, str] = os.environ) -> None:
    """Note a run that this process stands for. The run starts all the same if that fails."""
    step = find_step(environ)
    entry = Entry(
        run_dir=str(options.run_dir),
        host=registry.host(),
        pid=os.getpid(),
        born=registry.born(os.getpid()),
        job=environ.get("SLURM_JOB_ID", ""),
        step=step.step if step else "",
        checkpoints=options.checkpoints.directory if options.checkpoints else "",
        command=tuple(argv),
    )
    try:
        Errand(lambda: registry.add(entry)).result(_PATIENCE)
    except (OSError, RuntimeError) as error:
        if options.verbose:
            print(f"hpcft: warning: hpcft ps will not know of this run: {error}", file=sys.stderr)
