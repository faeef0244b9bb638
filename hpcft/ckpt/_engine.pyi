from collections.abc import Sequence
from typing import Any, final

import numpy as np
from typing_extensions import Buffer

CRC32C_BACKEND: str

_File = tuple[str, int, int]
_Extent = tuple[Buffer | np.ndarray[Any, Any] | None, int, int, int]

@final
class Transfer:
    def wait_copied(self, timeout: float | None = None) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def progress(self) -> tuple[int, int, int, bool]: ...
    def checksums(self) -> list[int]: ...
    def cancel(self) -> None: ...

@final
class Engine:
    def __init__(
        self,
        pool: int,
        *,
        chunk: int = ...,
        copiers: int = ...,
        movers: int = ...,
        depth: int = ...,
        bandwidth: int = ...,
        niceness: int = ...,
        cpus: Sequence[int] | None = ...,
    ) -> None: ...
    @property
    def backend(self) -> str: ...
    @property
    def peak(self) -> int: ...
    def write(
        self, files: Sequence[_File], extents: Sequence[_Extent], *, sync: bool = True
    ) -> Transfer: ...
    def read(self, files: Sequence[_File], extents: Sequence[_Extent]) -> Transfer: ...
    def close(self) -> None: ...

def crc32c(data: Buffer | np.ndarray[Any, Any], before: int = 0, /) -> int: ...
def crc32c_combine(first: int, second: int, length: int, /) -> int: ...
