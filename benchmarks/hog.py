"""A load on memory, in a file in /dev/shm: no process has it that the kernel could kill for it.

Reads lines ``BYTES RATE`` from standard input: go to so many bytes, by so many a second.
"""

from __future__ import annotations

import sys
import tempfile
import time

_BLOCK = 8 << 20


def main() -> None:
    """Entry of the process."""
    blocks = 0
    with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
        for line in sys.stdin:
            size, rate = map(float, line.split())
            while blocks != (wanted := round(size / _BLOCK)):
                if blocks < wanted:
                    file.seek(blocks * _BLOCK)
                    file.write(bytes(_BLOCK))
                    blocks += 1
                else:
                    blocks -= 1
                    file.truncate(blocks * _BLOCK)
                time.sleep(_BLOCK / rate)


if __name__ == "__main__":
    main()
