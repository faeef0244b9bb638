"""Which faults, when, to whom and for how long: read from a file, or drawn from a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from hpcft.errors import UsageError

Kind = Literal[
    "kill",
    "node",
    "hang",
    "slow",
    "cut",
    "lossy",
    "memory",
    "full",
    "slow-disk",
    "corrupt",
    "clock",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Seconds a fault lasts if that is not said; those not named are done at once.
_LASTING: dict[Kind, float] = {
    "hang": 5.0,
    "slow": 20.0,
    "cut": 10.0,
    "lossy": 20.0,
    "memory": 10.0,
    "full": 20.0,
    "slow-disk": 20.0,
    "corrupt": 60.0,
    "clock": 10.0,
}
#: Numbers that say how much, by kind: their name, and what they are if that is not said.
_AMOUNTS: dict[Kind, tuple[str, float]] = {
    "slow": ("factor", 3.0),
    "lossy": ("percent", 5.0),
    "memory": ("percent", 80.0),
    "slow-disk": ("mbps", 5.0),
    "clock": ("jump", 3600.0),
}
#: Of processes, of which one is hit; the others are of a host, or of the checkpoints.
OF_RANKS: frozenset[Kind] = frozenset(("kill", "hang", "slow", "memory", "slow-disk"))
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d*)?)(s|m|h)")


@dataclass(frozen=True)
class Order:
    """A fault that is to be done.

    at: seconds after the begin.
    kind: what.
    rank: to which rank; None: any.
    spare: to a spare, and not to a rank that trains.
    host: to whom on this host alone, or to the host; empty: any.
    seconds: how long.
    amount: how much, as the kind has it.
    newest: of ``corrupt``: the newest checkpoint, and not an older one.
    """

    at: float
    kind: Kind
    rank: int | None = None
    spare: bool = False
    host: str = ""
    seconds: float = 0.0
    amount: float = 0.0
    newest: bool = False

    @property
    def text(self) -> str:
        """As a schedule has it."""
        said = [f"{self.at:.12g}s", self.kind]
        said += [f"rank={self.rank}"] if self.rank is not None else []
        said += ["spare"] if self.spare else []
        said += [f"host={self.host}"] if self.host else []
        said += [f"for={self.seconds:.12g}s"] if self.kind in _LASTING else []
        said += [f"{_AMOUNTS[self.kind][0]}={self.amount:.12g}"] if self.kind in _AMOUNTS else []
        return " ".join([*said, "newest"] if self.newest else said)


def parse(text: str, name: str) -> list[Order]:
    """A schedule: a line a fault, ``WHEN WHAT [rank=N|spare] [host=NAME] [for=TIME] ...``.

    Parameters
    ----------
    name: of the file, for who reads of an error.

    Raises
    ------
    UsageError: it is none; says in which line, and why.
    """
    orders = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            try:
                orders.append(_order(words))
            except UsageError as error:
                raise UsageError(f"{name}, line {number}: {error.message}", error.remedy) from error
    if not orders:
        raise UsageError(f"{name} has no faults", "write lines such as: 10s kill rank=1")
    return sorted(orders, key=lambda order: order.at)


def _order(words: Sequence[str]) -> Order:
    if len(words) < 2:
        raise UsageError(f"{words[0]!r} is not all that is needed", "write WHEN WHAT, as 10s kill")
    order = plain(seconds("the time", words[0]), kind(words[1]))
    for word in words[2:]:
        order = _with(order, word)
    if order.rank is not None and order.spare:
        raise UsageError("rank= and spare exclude each other", "leave one of them away")
    return order


def _with(order: Order, word: str) -> Order:
    name, equals, value = word.partition("=")
    of_ranks = order.kind in OF_RANKS
    if word == "spare" and of_ranks:
        return replace(order, spare=True)
    if word == "newest" and order.kind == "corrupt":
        return replace(order, newest=True)
    if name == "rank" and of_ranks and value.isdecimal():
        return replace(order, rank=int(value))
    if name == "host" and value and order.kind not in ("full", "corrupt"):
        return replace(order, host=value)
    if name == "for" and order.kind in _LASTING:
        return replace(order, seconds=seconds("for=", value))
    if equals and order.kind in _AMOUNTS and name == _AMOUNTS[order.kind][0]:
        return replace(order, amount=_amount(order.kind, value))
    raise UsageError(f"{order.kind} does not take {word!r}", "see `hpcft chaos --help`")


def _amount(of: Kind, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    most = {"lossy": 100.0, "memory": 95.0, "slow": 100.0}.get(of, 1e9)
    least = -most if of == "clock" else 1.0
    # So written that nan is refused as well.
    if not least <= number <= most:
        raise UsageError(f"{_AMOUNTS[of][0]}={text} makes no sense", f"give {least:g} to {most:g}")
    return number


def plain(at: float, what: Kind) -> Order:
    """One with nothing said but when and what."""
    amount = _AMOUNTS[what][1] if what in _AMOUNTS else 0.0
    return Order(at, what, seconds=_LASTING.get(what, 0.0), amount=amount)


def kind(text: str) -> Kind:
    """A fault by its name.

    Raises
    ------
    UsageError: there is none so called.
    """
    for known in KINDS:
        if text == known:
            return known
    raise UsageError(f"there is no fault {text!r}", f"choose from {', '.join(KINDS)}")


def seconds(what: str, text: str) -> float:
    """``90s``, ``1.5m`` or ``2h``.

    Raises
    ------
    UsageError: it is no time.
    """
    found = _TIME.fullmatch(text)
    if not found:
        raise UsageError(f"{what} {text!r} is no time", "give something like 10s, 1.5m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def rate(text: str) -> float:
    """``6/h`` or ``2/m``, a second.

    Raises
    ------
    UsageError: it is no rate.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)/(s|m|h)", text)
    number = float(found[1]) / _UNITS[found[2]] if found else 0.0
    if not number:
        raise UsageError(f"--rate {text!r} is no rate", "give something like 6/h or 1/m")
    return number


def draw(rate: float, length: float, kinds: Sequence[Kind], seed: int) -> list[Order]:
    """Faults that come at random, and independently of each other; the same for the same seed.

    Parameters
    ----------
    rate: how many a second, on average.
    length: of the time in which they come, in seconds.
    """
    return list(_draw(random.Random(seed), rate, length, kinds))


def _draw(
    chance: random.Random, rate: float, length: float, kinds: Sequence[Kind]
) -> Iterator[Order]:
    at = chance.expovariate(rate)
    while at < length:
        yield plain(at, chance.choice(kinds))
        at += chance.expovariate(rate)
