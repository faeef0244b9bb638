"""Metrics in the forms in which ``hpcft metrics`` gives them out."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from hpcft.cli.output import write_whole
from hpcft.errors import HpcftError
from hpcft.telemetry.address import Address
from hpcft.watch.metrics import RunCollector

#: Seconds for which a port that is taken is tried again, and between two attempts.
_PATIENCE, _AGAIN = 3.0, 0.2


def text_of(families: Sequence[Metric], as_json: bool) -> str:
    """Metrics in Prometheus's text format, or as JSON, a line a sample."""
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


def serve(collector: RunCollector, address: Address, file: Path | None) -> int:
    """Serve a run's metrics until this process is to end; return the exit code.

    Parameters
    ----------
    file: gets where they are served, as JSON.

    Raises
    ------
    HpcftError: nothing can be served there, or the file not be written.
    """
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
            write_whole(file, text)
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
