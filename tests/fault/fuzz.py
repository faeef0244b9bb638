"""Files that are damaged, or made to harm: reading one gives the state or a clear error.

``python tests/fault/fuzz.py --cases 100000 --seed 7`` changes a good checkpoint in ways drawn from
the seed and reads it. Blind changes flip, cut, repeat and move bytes. Knowing ones change the
header, the index's JSON, places and checksums, and sign the result anew, as one would who means
harm. A case that gives a wrong state without such knowledge, that takes much memory, or raises
anything but a clear error is printed with the option that repeats it alone. A crash speaks for
itself.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcft.ckpt._engine import Engine, crc32c
from hpcft.ckpt.index import HEADER_SIZE, Damaged, Header, Stretch
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Alone, Saver
from hpcft.ckpt.store import Store

#: Bytes of address space a reader may take beyond what it has to begin with.
_MEMORY = 2 << 30
_STATE: dict[str, Any] = {
    "model": {"w": torch.arange(300), "b": torch.ones(7).bfloat16(), "e": torch.empty(0, 3)},
    "optim": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1, "ids": [0, 1]}]},
    "values": {"text": "abc", "none": None, "big": 1 << 70, "pair": (1, "x"), "raw": b"ab"},
}
_NUMBERS = [0, 1, -1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 10**30, 1.5, float("nan")]
_ODD: list[Any] = [None, True, "", "x", [], {}, [[]], "dict", "tensor", "../..", "\0", "é" * 100]


@dataclass
class Parts:
    """A file taken apart."""

    raw: bytearray
    header: Header
    index: Any
    places: list[int]
    checksums: list[int]

    @classmethod
    def of(cls, raw: bytes) -> Parts:
        header = Header.decode(raw[:HEADER_SIZE], len(raw))

        def at(stretch: Stretch) -> bytes:
            return raw[stretch.offset : stretch.offset + stretch.length]

        return cls(
            bytearray(raw),
            header,
            json.loads(at(header.index)),
            np.frombuffer(at(header.places), "<u8").tolist(),
            np.frombuffer(at(header.checksums), "<u4").tolist(),
        )

    def signed(self) -> bytes:
        """The file again, with checksums that fit; the index goes to the end, for it may grow."""
        raw = self.raw
        stretches = []
        text = json.dumps(self.index).encode("utf-8", "surrogatepass")
        places = b"".join(struct.pack("<Q", p & (2**64 - 1)) for p in self.places)
        sums = b"".join(struct.pack("<I", s & (2**32 - 1)) for s in self.checksums)
        for content in (text, places, sums):
            stretches.append(Stretch(len(raw), len(content), crc32c(content)))
            raw += content
        head = replace(
            self.header,
            size=len(raw),
            index=stretches[0],
            places=stretches[1],
            checksums=stretches[2],
        ).encode()
        raw[: len(head)] = head
        return bytes(raw)


def spots(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a JSON value."""
    yield path
    if isinstance(node, (dict, list)):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from spots(item, (*path, key))


def change_json(rng: random.Random, value: Any) -> None:
    """Change, drop, double, swap or bury something in a JSON value."""
    places = [p for p in spots(value) if p]
    path = rng.choice(places)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    what = rng.randrange(5)
    if what == 0:
        holder[path[-1]] = rng.choice(_NUMBERS + _ODD)
    elif what == 1:
        del holder[path[-1]]
    elif what == 2 and isinstance(holder, list):
        holder.insert(path[-1], json.loads(json.dumps(holder[path[-1]])))
    elif what == 3:
        other = rng.choice(places)
        source: Any = value
        for key in other:
            source = source[key]
        holder[path[-1]] = json.loads(json.dumps(source))
    else:
        deep: Any = holder[path[-1]]
        for _ in range(rng.choice([1, 70, 300])):
            deep = ["list", [deep]]
        holder[path[-1]] = deep


def knowing(rng: random.Random, raw: bytes) -> bytes:
    """Changed by somebody who knows the format."""
    parts = Parts.of(raw)
    for _ in range(rng.randint(1, 3)):
        what = rng.randrange(4)
        if what == 0 and len(parts.index):
            change_json(rng, parts.index)
        elif what == 1 and parts.places:
            number = rng.choice(
                [0, 1, 2**63, 2**64 - 1, len(raw), len(raw) - 1, rng.randrange(len(raw))]
            )
            parts.places[rng.randrange(len(parts.places))] = number
        elif what == 2 and parts.checksums:
            parts.checksums[rng.randrange(len(parts.checksums))] = rng.getrandbits(32)
        else:
            longer = rng.choice([parts.places, parts.checksums])
            longer.append(rng.getrandbits(32))
    return parts.signed()


def header_only(rng: random.Random, raw: bytes) -> bytes:
    """A header with other numbers, signed."""
    header = Parts.of(raw).header
    number = rng.choice([0, 1, 2**62, 2**64 - 1, len(raw), len(raw) - 1, rng.randrange(len(raw))])
    name = rng.choice(["size", "step", "index", "places", "checksums"])
    if name in ("size", "step"):
        header = replace(header, **{name: number})
    else:
        old: Stretch = getattr(header, name)
        field = rng.choice(["offset", "length", "checksum"])
        header = replace(header, **{name: replace(old, **{field: number})})
    head = header.encode()
    return head + raw[len(head) :]


def blind(rng: random.Random, raw: bytes) -> bytes:
    """Changed as disks and networks do it."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        # Most of the file is zeros between blocks: prefer where something is.
        place = rng.choice([rng.randrange(len(data) or 1), rng.randrange(min(300, len(data) or 1))])
        what = rng.randrange(5)
        if what == 0 and data:
            data[place] ^= rng.randrange(1, 256)
        elif what == 1:
            del data[place:]
        elif what == 2:
            data[place : place + 16] = bytes(16)
        elif what == 3:
            data[place:place] = data[place : place + rng.randrange(1, 5000)]
        else:
            length = rng.randrange(1, 200)
            start = rng.randrange(len(data) or 1)
            data[place : place + length] = data[start : start + length]
    return bytes(data)


WAYS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "blind": blind,
    "header": header_only,
    "knowing": knowing,
}


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, types included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


class Fuzzer:
    """Tries cases on a checkpoint in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._engine = Engine(8 << 20, chunk=1 << 20, depth=0)
        store = Store(folder / "good")
        save = Saver(store, Alone(), self._engine).begin(3, _STATE)
        while not save.advance():
            pass
        save.finish()
        self._good = store.committed()[-1].state.read_bytes()
        self._file = folder / "case.h5"

    def case(self, seed: str) -> tuple[str, str]:
        """Try the case that follows from ``seed``.

        Returns
        -------
        (way, what is wrong): the latter empty if nothing is.
        """
        rng = random.Random(seed)
        way = rng.choice(list(WAYS))
        # Deeper than the reader goes, which keeps to Python's usual limit.
        usual = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)
        self._file.write_bytes(WAYS[way](rng, self._good))
        sys.setrecursionlimit(usual)
        try:
            _, state = load(self._file, self._engine)
        except Damaged:
            return f"{way}, refused", ""
        except Exception as error:
            return way, f"{type(error).__name__}: {error}"
        if way == "blind" and not same(_STATE, state):
            return way, f"a wrong state: {state}"
        return f"{way}, read", ""


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="how many (default 10000)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", metavar="SEED.NUMBER", help="repeat this case")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    seeds = [args.only] if args.only else [f"{args.seed}.{n}" for n in range(args.cases)]
    results: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, resource.RLIM_INFINITY))
        for seed in seeds:
            way, verdict = fuzzer.case(seed)
            results[way] += 1
            if verdict:
                wrong += 1
                print(f"{way}: {verdict[:300]}\nrepeat: {sys.argv[0]} --only {seed}", flush=True)
    print(f"{dict(sorted(results.items()))}; {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
