"""What spares do while they wait (``--spares-do``)."""

from __future__ import annotations

from typing import Literal, cast, get_args

from hpcft.errors import UsageError

#: ``evaluate``: one of them evaluates each new checkpoint. ``copies``: nodes that have only spares
#: keep the copies of checkpoints near the ranks. ``drain``: one of them writes what the ranks have
#: saved near them to the directory.
Duty = Literal["evaluate", "copies", "drain"]


def parse(text: str, spares: int, saves: bool, near: bool, partners: bool) -> tuple[Duty, ...]:
    """``evaluate,copies``, each once.

    Parameters
    ----------
    spares: how many there are to be.
    saves: whether there are checkpoints.
    near: whether there are some near the ranks.
    partners: whether these have copies on another node.

    Raises
    ------
    UsageError: a duty is unknown, or there is nothing that it could be done with.
    """
    duties = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    *known, last = get_args(Duty)
    for duty in duties:
        if duty not in get_args(Duty):
            raise UsageError(
                f"--spares-do does not know {duty!r}", f"choose from {', '.join(known)} and {last}"
            )
    if not duties:
        raise UsageError("--spares-do names nothing to do", "leave it away, or give evaluate")
    if spares < 1:
        raise UsageError("--spares-do is given, and there are no spares", "give --spares 1 or more")
    if "evaluate" in duties and not saves:
        raise UsageError(
            "--spares-do evaluate has nothing to evaluate: spares read checkpoints",
            "give --ckpt-dir as well, and --ckpt-every for how often",
        )
    if "copies" in duties and not partners:
        raise UsageError(
            "--spares-do copies is for the copies that --ckpt-near has made on another node",
            "give --ckpt-near as well, with --ckpt-near-copies partner",
        )
    if "drain" in duties and not near:
        raise UsageError(
            "--spares-do drain has nothing to write from: spares take what is saved near the ranks",
            "give --ckpt-dir and --ckpt-near as well, such as --ckpt-near 50",
        )
    return cast("tuple[Duty, ...]", duties)
