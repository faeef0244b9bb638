"""What a rank hears from its shepherd."""

from __future__ import annotations

import json
import socket

from hpcft.world.link import Link
from hpcft.world.progress import Progress


def test_of_who_dies_before_all_have_met_a_rank_hears_when_it_listens() -> None:
    ours, theirs = socket.socketpair()
    link = Link(theirs, Progress.create())
    messages = [
        {"kind": "failed", "rank": 2, "cause": "", "at": 1.0},
        {"kind": "ready"},
        {"kind": "cause", "rank": 2, "cause": "killed by SIGKILL"},
    ]
    ours.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
    link.await_ready()
    ours.close()
    heard: list[int] = []
    link.listen(heard.append)
    assert link.news.wait(30)
    assert heard == [2]
    failure = link.failure(2, 0)
    assert failure is not None
    assert failure.at == 1.0
