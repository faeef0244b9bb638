"""Telling the MPI library that a process has failed.

ULFM in Open MPI learns of failures from PMIx events, from broken connections and from its own
heartbeats. Here the shepherds are the only judges, so the heartbeats are off, and what the
shepherds found is handed in as the PMIx event it would have been: ``PMIx_Notify_event`` with the
range "this process only", a call of the PMIx standard (5.0, section 9.4). Open MPI's handler for
PMIX_ERR_PROC_TERM_WO_SYNC then marks the process as failed, and every operation that waits for it
ends with MPI_ERR_PROC_FAILED.

MPI has no call for this, and the process's own library is the only one told, so that this needs
neither server nor network.
"""

from __future__ import annotations

import ctypes
import os

from hpcft.errors import HpcftError
from hpcft.world.pmix import Info, Proc, library

# From the PMIx standard's header.
_PMIX_ERR_PROC_TERM_WO_SYNC = -200
_PMIX_RANGE_PROC_LOCAL = 7
_PMIX_EVENT_AFFECTED_PROC = b"pmix.evproc"


class Notifier:
    """Hands failures to this process's MPI library. To be made after MPI is initialised.

    Raises
    ------
    HpcftError: no PMIx is loaded, or it does not say who we are.
    """

    def __init__(self) -> None:
        self._pmix = library()
        self._pmix.PMIx_Notify_event.restype = ctypes.c_int
        try:
            self._me = Proc(os.environ["PMIX_NAMESPACE"].encode(), int(os.environ["PMIX_RANK"]))
        except KeyError as missing:
            raise HpcftError(
                f"{missing} is not set", "start the ranks with mpiexec or with srun --mpi=pmix"
            ) from None

    def failed(self, rank: int) -> None:
        """The process with this rank in MPI_COMM_WORLD has failed. Any thread may call this."""
        affected = Proc(self._me.nspace, rank)
        info = Info.of(_PMIX_EVENT_AFFECTED_PROC, affected)
        # With neither callback PMIx copies what it keeps before it returns.
        status = self._pmix.PMIx_Notify_event(
            _PMIX_ERR_PROC_TERM_WO_SYNC,
            ctypes.byref(self._me),
            ctypes.c_uint8(_PMIX_RANGE_PROC_LOCAL),
            ctypes.byref(info),
            ctypes.c_size_t(1),
            None,
            None,
        )
        if status not in (0, -157):  # PMIX_SUCCESS, PMIX_OPERATION_SUCCEEDED
            raise HpcftError(f"PMIx_Notify_event returned {status}")
