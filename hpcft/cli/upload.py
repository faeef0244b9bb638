"""``hpcft upload``."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from hpcft.cli.output import amount, bar, print_json
from hpcft.cli.runs import RUN, add_run
from hpcft.errors import HpcftError, UsageError
from hpcft.report.amounts import duration
from hpcft.watch.runs import find

SUMMARY = "copy what a training leaves to another place"

DESCRIPTION = f"""\
Copy what a training leaves to URL/NAME/, where NAME is the last part of the run directory's path:
summary.json, events.jsonl, ranks.json, status.json, laps/, tensorboard/ and logs/; not checkpoints,
nor door.json, which holds a secret. `hpcft run --upload URL` does it at the end of the run; by hand
it may be done at any time, also while the run goes, and again.

    hpcft upload RUN /archive/runs              a directory
    hpcft upload RUN s3://bucket/runs           S3; needs pip install s3fs
    hpcft upload RUN sftp://host/runs           whatever fsspec knows

{RUN}"""

_EPILOG = """\
What fails is tried again, at growing intervals. S3 takes keys, region and server as usual from
~/.aws or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL.

exit code: 0; 1 not all was uploaded; 2 there is no such run, or wrong use; 130 Ctrl-C
"""

#: Seconds between two lines about the progress where there is no terminal.
_PERIOD = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add_run(parser)
    add = parser.add_argument
    add("url", metavar="URL", help="directory, or URL of one, that the run's directory goes into")
    add(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="give up when nothing could be uploaded for so long (default 60)",
    )
    add("--json", action="store_true", help="print what became of it as JSON")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    # Which takes its time to be loaded, as for fsspec; the other commands need not spend it.
    from hpcft.watch.upload import Upload, items

    # So written that nan is refused as well.
    if not args.patience >= 0:
        raise UsageError(f"--patience {args.patience} makes no sense", "give 0 seconds or more")
    rundir = find(args.run_name).rundir
    url = f"{args.url.rstrip('/')}/{rundir.path.name}"
    try:
        files = items(rundir)
    except OSError as error:
        raise HpcftError(f"{rundir.path} cannot be read: {error}") from error
    upload = Upload(files, url, args.patience)
    began, why = time.monotonic(), ""
    try:
        with bar("uploading", wanted=True) as shown:
            upload.run(_Progress(shown), _tell_of_failure)
    except OSError as error:
        why = str(error)
    seconds = time.monotonic() - began
    if args.json:
        told: dict[str, Any] = {"run": str(rundir.path), "url": url, "uploaded": not why}
        told |= {"error": why or None, "files": len(files)}
        print_json([told | {"bytes": upload.moved, "seconds": round(seconds, 3)}])
    if why:
        raise HpcftError(
            f"not uploaded to {url}: {why}",
            f"the run is kept in {rundir.path}; try again: hpcft upload {rundir.path} {args.url}",
        )
    if not args.json:
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        print(f"hpcft: uploaded {count}, {amount(upload.total)}, to {url} in {duration(seconds)}")
    return 0


def _tell_of_failure(why: str) -> None:
    print(f"hpcft: the upload failed and is tried again: {why}", file=sys.stderr, flush=True)


class _Progress:
    """A bar at a terminal; elsewhere a line now and then."""

    def __init__(self, shown: Any) -> None:
        self._shown = shown
        self._next = time.monotonic() + _PERIOD

    def __call__(self, moved: int, total: int) -> None:
        self._shown(moved, total)
        if not sys.stderr.isatty() and time.monotonic() >= self._next:
            self._next = time.monotonic() + _PERIOD
            text = f"hpcft: uploading: {amount(moved)} of {amount(total)}"
            print(text, file=sys.stderr, flush=True)
