"""The PMIx library with which this process's MPI library speaks to what has started it.

What is called here is of the PMIx standard (5.0).
"""

from __future__ import annotations

import ctypes
import os

from hpcft.errors import HpcftError

# From the standard's header.
_PMIX_BOOL = 1
_PMIX_PROC = 22
_PMIX_COLLECT_DATA = b"pmix.collect"


class Proc(ctypes.Structure):
    """``pmix_proc_t``: a process."""

    _fields_ = [("nspace", ctypes.c_char * 256), ("rank", ctypes.c_uint32)]


class _Data(ctypes.Union):
    # The largest member is pmix_byte_object_t or pmix_envar_t, at most three words.
    _fields_ = [
        ("flag", ctypes.c_bool),
        ("proc", ctypes.POINTER(Proc)),
        ("rest", ctypes.c_uint64 * 3),
    ]


class _Value(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint16), ("data", _Data)]


class Info(ctypes.Structure):
    """``pmix_info_t``: a word on how something is meant."""

    _fields_ = [("key", ctypes.c_char * 512), ("flags", ctypes.c_uint32), ("value", _Value)]

    @classmethod
    def of(cls, key: bytes, value: bool | Proc) -> Info:
        """It lasts no longer than ``value``."""
        if isinstance(value, Proc):
            return cls(key, 0, _Value(_PMIX_PROC, _Data(proc=ctypes.pointer(value))))
        return cls(key, 0, _Value(_PMIX_BOOL, _Data(flag=value)))


def library() -> ctypes.CDLL:
    """The copy that the MPI library has loaded; only that one will do, and there may be others.

    Raises
    ------
    HpcftError: there is none.
    """
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if os.path.basename(path).startswith("libpmix.so"):
                return ctypes.CDLL(path)
    raise HpcftError(
        "the MPI library has not loaded libpmix",
        "hpcft needs Open MPI 5 with PMIx; run `hpcft doctor`",
    )


def fence() -> None:
    """Wait until all ranks of the job have come here, without sending anything through MPI.

    ``PMIx_Fence``, with the collection of data: under srun, with Slurm 22.05 and PMIx 4.2, one
    without it returns at once and waits for nobody, seen 300 times of 300.

    Raises
    ------
    HpcftError: that cannot be had.
    """
    collect = Info.of(_PMIX_COLLECT_DATA, True)
    status = library().PMIx_Fence(
        None, ctypes.c_size_t(0), ctypes.byref(collect), ctypes.c_size_t(1)
    )
    if status:
        raise HpcftError(
            f"PMIx_Fence returned {status}", "start the ranks with mpiexec or with srun --mpi=pmix"
        )
