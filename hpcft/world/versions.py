"""What is known of the versions of Open MPI."""

from __future__ import annotations


def known_problem(version: str) -> str:
    """What is known to go wrong with ``version``, as in ``"5.0.9"``; empty if nothing is.

    Seen with 5.0.10 and 5.0.11, and not before: a process that learns of a death while it makes a
    communicator calls through a null pointer (``coll_revoke_local``, open-mpi/ompi pull request
    13642).
    """
    if version in ("5.0.10", "5.0.11"):
        return (
            f"Open MPI {version} can crash in the survivors when another rank dies during a "
            "recovery; 5.0.9 does not"
        )
    return ""
