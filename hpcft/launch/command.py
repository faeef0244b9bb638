"""Starting a command of hpcft's as a child, so that who starts it stays small."""

from __future__ import annotations

import signal
import subprocess
import sys

from hpcft.world.parent import die_with_parent


def start(words: list[str], quiet: bool, end: signal.Signals) -> subprocess.Popen[bytes]:
    """Start ``hpcft WORDS``.

    Parameters
    ----------
    quiet: only errors are said; else, on stderr, all.
    end: what it gets when this process ends. Ctrl-C reaches this process alone, which knows what
        it means.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "hpcft.cli.main", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else sys.stderr,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(end),
    )
