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

# From the PMIx standard's header.
_PMIX_ERR_PROC_TERM_WO_SYNC = -200
_PMIX_RANGE_PROC_LOCAL = 7
_PMIX_PROC = 22
_PMIX_EVENT_AFFECTED_PROC = b"pmix.evproc"


class _Proc(ctypes.Structure):
    _fields_ = [("nspace", ctypes.c_char * 256), ("rank", ctypes.c_uint32)]


class _Value(ctypes.Structure):
    # The union's largest member is pmix_byte_object_t or pmix_envar_t, at most three words.
    _fields_ = [
        ("type", ctypes.c_uint16),
        ("proc", ctypes.POINTER(_Proc)),
        ("rest", ctypes.c_uint64 * 3),
    ]


class _Info(ctypes.Structure):
    _fields_ = [("key", ctypes.c_char * 512), ("flags", ctypes.c_uint32), ("value", _Value)]


def _loaded_library() -> ctypes.CDLL:
    # Open MPI may bring a PMIx of its own: only the copy it has loaded will do.
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if os.path.basename(path).startswith("libpmix.so"):
                return ctypes.CDLL(path)
    raise HpcftError(
        "the MPI library has not loaded libpmix",
        "hpcft needs Open MPI 5 with PMIx; run `hpcft doctor`",
    )


class Notifier:
    """Hands failures to this process's MPI library. To be made after MPI is initialised.

    Raises
    ------
    HpcftError: no PMIx is loaded, or it does not say who we are.
    """

    def __init__(self) -> None:
        self._pmix = _loaded_library()
        self._pmix.PMIx_Notify_event.restype = ctypes.c_int
        try:
            self._me = _Proc(os.environ["PMIX_NAMESPACE"].encode(), int(os.environ["PMIX_RANK"]))
        except KeyError as missing:
            raise HpcftError(
                f"{missing} is not set", "start the ranks with mpiexec or with srun --mpi=pmix"
            ) from None

    def failed(self, rank: int) -> None:
        """The process with this rank in MPI_COMM_WORLD has failed. Any thread may call this."""
        affected = _Proc(self._me.nspace, rank)
        info = _Info(_PMIX_EVENT_AFFECTED_PROC, 0, _Value(_PMIX_PROC, ctypes.pointer(affected)))
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
