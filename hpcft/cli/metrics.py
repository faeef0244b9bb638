"""``hpcft metrics``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from hpcft.cli.runs import RUN, add_run
from hpcft.errors import HpcftError, UsageError
from hpcft.telemetry.address import Address
from hpcft.watch.metrics import RunCollector
from hpcft.watch.runs import Run, find

SUMMARY = "a training's figures, as Prometheus has them"

DESCRIPTION = f"""\
Print a training's figures in Prometheus's text format, made from its run directory: they are those
that `hpcft run --metrics-port` serves while it trains.

    hpcft metrics RUN                              print them
    hpcft metrics RUN --output FILE                write FILE, the old one or the new one at any
                                                   time, as node_exporter's textfile collector
                                                   needs it: FILE is to end in .prom
    hpcft metrics RUN --serve 9100                 serve them until Ctrl-C, from any host that
                                                   sees the run directory

{RUN}
See docs/metrics.md for what each figure is.
"""

#: Seconds for which a port that is taken is tried again, and between two attempts.
_PATIENCE, _AGAIN = 3.0, 0.2

_EPILOG = "exit code: 0; 1 the run cannot be read or FILE not be written; 2 there is no such run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add_run(parser)
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE", help="write this file instead")
    add("--serve", metavar="[HOST:]PORT", help="serve them at http://HOST:PORT/metrics; 0: a free")
    add("--address", type=Path, metavar="FILE", help="with --serve: write where, as JSON, to FILE")
    add("--json", action="store_true", help="print JSON, a line a sample")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    if args.serve is not None and (args.output or args.json):
        raise UsageError("--serve goes with neither --output nor --json", "leave one away")
    if args.address and args.serve is None:
        raise UsageError("--address says where --serve serves", "give both")
    run = find(args.run_name)
    collector = RunCollector(run.name, run.rundir)
    if args.serve is not None:
        return _serve(collector, Address.parse("--serve", args.serve), args.address)
    with _readable(run):
        text = _text(collector.read(), args.json)
    if args.output:
        _replace(args.output, text)
    else:
        sys.stdout.write(text)
    return 0


@contextlib.contextmanager
def _readable(run: Run) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HpcftError(f"{run.rundir.path} cannot be read: {error}") from error


def _text(families: Sequence[Metric], as_json: bool) -> str:
    if as_json:
        samples = (sample for family in families for sample in family.samples)
        return "".join(json.dumps(_as_json(sample)) + "\n" for sample in samples)
    return generate_latest(_Read(families)).decode()


class _Read(CollectorRegistry):
    """A registry of what has been collected already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _as_json(sample: Sample) -> dict[str, object]:
    # What JSON cannot say is null.
    value = sample.value if abs(sample.value) < float("inf") else None
    return {"name": sample.name, "labels": sample.labels, "value": value}


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            aside.write_text(text)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise HpcftError(f"{path} cannot be written: {error.strerror or error}") from error


def _serve(collector: RunCollector, address: Address, file: Path | None) -> int:
    registry = CollectorRegistry()
    registry.register(collector)
    over = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        over.set()

    # Whoever started this ends it by SIGTERM, which is no failure.
    signal.signal(signal.SIGTERM, end)
    # Whoever has served a run before this, as its node or place was lost, may be about to end.
    patient = Retrying(
        wait=wait_fixed(_AGAIN),
        stop=stop_after_delay(_PATIENCE),
        retry=retry_if_exception_type(OSError),
        reraise=True,
    )
    try:
        server, thread = patient(start_http_server, address.port, address.host, registry)
    except OSError as error:
        raise HpcftError(
            f"nothing can be served at {address}: {error.strerror or error}",
            "give another port, or 0 for a free one",
        ) from error
    host = socket.gethostname() if address.everywhere else address.host
    url = f"http://{Address(host, server.server_port)}/metrics"
    print(f"hpcft: metrics at {url}", flush=True)
    text = json.dumps({"url": url}) + "\n"
    try:
        if file:
            _replace(file, text)
        # In bits, for a signal is taken between them.
        while not over.wait(0.5):
            pass
    finally:
        server.shutdown()
        thread.join()
        # Of a successor it says something else.
        with contextlib.suppress(OSError):
            if file and file.read_text() == text:
                file.unlink()
    return 0
