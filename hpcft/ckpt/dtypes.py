"""Element types by their torch names, and what they are in HDF5.

========================  ===================================================================
torch                     HDF5
========================  ===================================================================
float16, 32, 64           IEEE little-endian floats
int*, uint*               little-endian integers
bool                      h5py's enumeration FALSE, TRUE
complex64, complex128     h5py's compound of r and i
bfloat16                  a float of 16 bits, exponent 8 (bias 127), mantissa 7
float8_e5m2               a float of 8 bits, exponent 5 (bias 15), mantissa 2
other float8 and float4   uint8, with the attribute ``dtype``: their codes for infinity and
                          not-a-number are not those HDF5 has for floats
========================  ===================================================================

h5py and ``h5dump`` show the custom floats as the numbers they are (h5py as float32 or float16).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from h5py import h5t

_NUMPY = {
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "int8": "i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "bool": "?",
    "complex64": "<c8",
    "complex128": "<c16",
}


@dataclass(frozen=True)
class _Float:
    """A float of HDF5: sizes in bits."""

    size: int
    exponent: int
    mantissa: int
    bias: int


_FLOATS = {"bfloat16": _Float(16, 8, 7, 127), "float8_e5m2": _Float(8, 5, 2, 15)}

#: Kept as bytes, with their name in the attribute ``dtype``.
_OPAQUE = {"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}

_SIZES = (
    {name: np.dtype(kind).itemsize for name, kind in _NUMPY.items()}
    | {name: form.size // 8 for name, form in _FLOATS.items()}
    | dict.fromkeys(_OPAQUE, 1)
)


def item_size(name: str) -> int:
    """Bytes of an element.

    Raises
    ------
    KeyError: there is no such type.
    """
    return _SIZES[name]


def in_numpy(name: str) -> bool:
    """Whether numpy has the type."""
    return name in _NUMPY


def opaque(name: str) -> bool:
    """Whether the HDF5 type does not tell the torch type."""
    return name in _OPAQUE


def numpy_name(dtype: np.dtype) -> str:
    """The torch name of a numpy type.

    Raises
    ------
    KeyError: torch has no such type.
    """
    name = dtype.name
    _NUMPY[name]
    return name


def numpy_type(name: str) -> np.dtype:
    """The numpy type, little-endian; of what numpy does not have, an unsigned integer's."""
    return np.dtype(_NUMPY.get(name, f"<u{item_size(name)}"))


def hdf5_type(name: str) -> h5t.TypeID:
    """The HDF5 type."""
    if name in _FLOATS:
        form = _FLOATS[name]
        kind = h5t.IEEE_F32LE.copy()
        kind.set_fields(form.size - 1, form.mantissa, form.exponent, 0, form.mantissa)
        kind.set_size(form.size // 8)
        kind.set_ebias(form.bias)
        return kind
    if name in _OPAQUE:
        return h5t.STD_U8LE
    return h5t.py_create(np.dtype(_NUMPY[name]), logical=True)
