"""Waiting for messages in a world that can break."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI

#: Requests nobody waits for any more. MPI may still use their memory, which they keep.
_given_up: list[MPI.Request] = []


def wait_all(requests: Sequence[MPI.Request]) -> bool:
    """Wait for all of them; True then.

    Not ``MPI_Waitall``: if one fails, it frees others that are still under way, and their memory
    with them. Those left alone cannot harm: Open MPI 5.0.9 ends the process ("Send error after
    request freed") when a send that it has given up, because the peer is dead, comes to its end
    before it is freed, and it gives up only what is waited for. (Corrected in 5.0.10, which has
    worse faults. A send inside a collective still can meet it.)

    Raises
    ------
    MPI.Exception: one has failed; the others are left alone.
    """
    for number, request in enumerate(requests):
        try:
            request.Wait()
        except MPI.Exception:
            _given_up.extend(requests[number:])
            raise
    return True


def all_done(requests: Sequence[MPI.Request]) -> bool:
    """Whether all are complete; the same for ``MPI_Testall``.

    Raises
    ------
    MPI.Exception: one has failed; the others are left alone.
    """
    try:
        return all(request.Test() for request in requests)
    except MPI.Exception:
        _given_up.extend(requests)
        raise
