"""Files that are damaged, or made to harm: reading one gives the state or a clear error.

``python tests/fault/fuzz.py --cases 100000 --seed 7`` changes a good checkpoint in ways drawn from
the seed and reads it. Blind changes flip, cut, repeat and move bytes. Knowing ones change the
header, the index's JSON, pieces and checksums, and sign the result anew, as one would who means
harm. Half of the cases have a file per rank; there another file may be changed, or gone, or the
index may name one that lies elsewhere and is as good. A case that gives a wrong state without such
knowledge, that reads a file elsewhere, takes much memory, or raises anything but a clear error is
printed with the option that repeats it alone. A crash speaks for itself.
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
from hpcft.ckpt.filesystem import Layout
from hpcft.ckpt.index import HEADER_SIZE, Damaged, Header, Piece, Stretch
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import STATE, Store, files

#: Bytes of address space a reader may take beyond what it has to begin with.
_MEMORY = 2 << 30
_STATE: dict[str, Any] = {
    "model": {"w": torch.arange(300), "b": torch.ones(7).bfloat16(), "e": torch.empty(0, 3)},
    "large": torch.arange(10_000),
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
    pieces: list[list[int]]
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
            np.frombuffer(at(header.pieces), "<u8").reshape(-1, len(Piece._fields)).tolist(),
            np.frombuffer(at(header.checksums), "<u4").tolist(),
        )

    def signed(self) -> bytes:
        """The file again, with checksums that fit; the index goes to the end, for it may grow."""
        raw = self.raw
        stretches = []
        text = json.dumps(self.index).encode("utf-8", "surrogatepass")
        numbers = (number for row in self.pieces for number in row)
        pieces = b"".join(struct.pack("<Q", n & (2**64 - 1)) for n in numbers)
        sums = b"".join(struct.pack("<I", s & (2**32 - 1)) for s in self.checksums)
        for content in (text, pieces, sums):
            stretches.append(Stretch(len(raw), len(content), crc32c(content)))
            raw += content
        head = replace(
            self.header,
            size=len(raw),
            index=stretches[0],
            pieces=stretches[1],
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
        what = rng.randrange(6)
        if what == 0 and len(parts.index):
            change_json(rng, parts.index)
        elif what == 1 and parts.pieces:
            number = rng.choice(
                [0, 1, 2, 2**63, 2**64 - 1, len(raw), len(raw) - 1, rng.randrange(len(raw))]
            )
            row = rng.choice(parts.pieces)
            row[rng.randrange(len(row))] = number
        elif what == 4 and parts.pieces:
            change_rows(rng, parts)
        elif what == 2 and parts.checksums:
            parts.checksums[rng.randrange(len(parts.checksums))] = rng.getrandbits(32)
        else:
            parts.checksums.append(rng.getrandbits(32))
    return parts.signed()


def change_rows(rng: random.Random, parts: Parts) -> None:
    """Drop, double, swap, or cut a piece in two, which may be as good."""
    rows = parts.pieces
    number = rng.randrange(len(rows))
    what = rng.randrange(4)
    if what == 0:
        del rows[number]
    elif what == 1:
        rows.insert(number, list(rows[number]))
    elif what == 2:
        other = rng.randrange(len(rows))
        rows[number], rows[other] = rows[other], rows[number]
    else:
        leaf, begin, length, file, offset = rows[number]
        cut = rng.randint(0, length)
        rest = [leaf, begin + cut, length - cut, file, offset + cut]
        rows[number : number + 1] = [[leaf, begin, cut, file, offset], rest]
        sums = [crc32c(bytes(parts.raw[o : o + n])) for o, n in ((offset, cut), (rest[4], rest[2]))]
        leaves = len(parts.index["leaves"]) if isinstance(parts.index, dict) else 0
        parts.checksums[leaves + number : leaves + number + 1] = sums


def header_only(rng: random.Random, raw: bytes) -> bytes:
    """A header with other numbers, signed."""
    header = Parts.of(raw).header
    number = rng.choice([0, 1, 2**62, 2**64 - 1, len(raw), len(raw) - 1, rng.randrange(len(raw))])
    name = rng.choice(["size", "step", "index", "pieces", "checksums"])
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


def elsewhere(rng: random.Random, raw: bytes, folder: Path) -> bytes:
    """One of the files is said to be outside the checkpoint's directory, where there is a copy."""
    parts = Parts.of(raw)
    shard = rng.choice(parts.index["shards"])
    name = shard[0]
    leads = [f"../{name}", str(folder / name), f"./../{name}", f"x/../../{name}", f"link/{name}"]
    shard[0] = rng.choice(leads)
    return parts.signed()


WAYS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "blind": blind,
    "header": header_only,
    "knowing": knowing,
}


LAYOUTS: tuple[Layout, ...] = ("shared", "per-rank")


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
    """Tries cases on checkpoints in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._engine = Engine(8 << 20, chunk=1 << 20, depth=0)
        #: By layout: the good files, that with the index first, and where cases are tried.
        self._good: dict[Layout, tuple[dict[str, bytes], Path]] = {}
        for layout in LAYOUTS:
            place = folder / layout / "case"
            place.mkdir(parents=True)
            store = Store(folder / layout / "good").create()
            save = Saver(store, Alone(), self._engine, layout=layout).begin(3, _STATE)
            while not save.advance():
                pass
            save.finish()
            found = files(store.committed()[-1].path)
            found.sort(key=lambda file: file.name != STATE)
            good = {file.name: file.read_bytes() for file in found}
            self._good[layout] = good, place
            # What a name that leads out of the directory would find.
            for name, content in good.items():
                (place.parent / name).write_bytes(content)
            (place / "link").symlink_to(place.parent)

    def case(self, seed: str) -> tuple[str, str]:
        """Try the case that follows from ``seed``.

        Returns
        -------
        (way, what is wrong): the latter empty if nothing is.
        """
        rng = random.Random(seed)
        good, place = self._good[rng.choice(LAYOUTS)]
        changed = dict(good)
        shards = [name for name in good if name != STATE]
        way = rng.choice([*WAYS, *(["shard", "elsewhere"] if shards else [])])
        # Deeper than the reader goes, which keeps to Python's usual limit.
        usual = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)
        if way == "shard":
            name = rng.choice(shards)
            changed[name] = blind(rng, good[name])
            if not rng.randrange(10):
                del changed[name]
        elif way == "elsewhere":
            changed[STATE] = elsewhere(rng, good[STATE], place.parent)
        else:
            changed[STATE] = WAYS[way](rng, good[STATE])
        sys.setrecursionlimit(usual)
        for name in good:
            (place / name).unlink(missing_ok=True)
            if name in changed:
                (place / name).write_bytes(changed[name])
        try:
            _, state = load(place / STATE, self._engine)
        except Damaged:
            return f"{way}, refused", ""
        except Exception as error:
            return way, f"{type(error).__name__}: {error}"
        if way == "elsewhere":
            return way, "a file outside the directory was read"
        if way in ("blind", "shard") and not same(_STATE, state):
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
