"""Teach a small transformer to write Python, on ranks that may die at any moment.

It learns, character by character, from the source of Python's own standard library, which is on
every machine that can run this:

    python -m hpcft.run --nproc 4 --spares 1 examples/train_lm.py --steps 200

`--params 10M` (or 1M, 100M, ...) makes the model larger. As in train_digits.py, a rank killed on
the way is replaced by the spare within a fraction of a second, with the same outcome to the bit.
That includes dropout: hpcft gives every rank its random numbers by its place and the step, so a
spare draws exactly what the rank it replaces would have drawn.
"""

from __future__ import annotations

import argparse
import math
import string
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import hpcft

ALPHABET = string.printable  # the last place, one past these, stands for any other character
LAYERS = 4
HEADS = 4
CONTEXT = 64  # characters the model looks back


# ---- the data ---------------------------------------------------------------------------------


def standard_library(characters: int) -> str:
    """The first so many characters of the standard library's modules in alphabetical order."""
    text: list[str] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text.append(file.read_text(encoding="utf-8", errors="replace"))
        characters -= len(text[-1])
        if characters <= 0:
            break
    return "".join(text)


def encode(text: str) -> Tensor:
    place = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([place.get(character, len(ALPHABET)) for character in text])


class Passages(Dataset[tuple[Tensor, Tensor]]):
    """Passages of CONTEXT characters, each with the characters that follow them one place on."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * CONTEXT
        passage = self.text[start : start + CONTEXT + 1]
        return passage[:-1], passage[1:]


# ---- the model --------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer: each character looks at those before it, then thinks for itself."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.before_thought = nn.LayerNorm(width)
        self.thought = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, HEADS, width // HEADS).transpose(1, 2)
            for part in self.query_key_value(self.before_attention(x)).chunk(3, dim=-1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = seen.transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout(self.attended(seen))
        return x + self.dropout(self.thought(self.before_thought(x)))


class LanguageModel(nn.Module):
    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        symbols = len(ALPHABET) + 1
        self.symbol = nn.Embedding(symbols, width)
        self.place = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, dropout) for _ in range(LAYERS)))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, symbols))

    def forward(self, text: Tensor) -> Tensor:
        """Scores of every symbol as the next one, for each place of each passage."""
        places = torch.arange(text.shape[1])
        return self.last(self.blocks(self.symbol(text) + self.place(places)))

    @torch.no_grad()
    def write(self, beginning: str, length: int) -> str:
        """Go on from ``beginning``, drawing each character as likely as the model finds it."""
        text = encode(beginning)
        for _ in range(length):
            scores = self(text[None, -CONTEXT:])[0, -1, : len(ALPHABET)]
            text = torch.cat([text, torch.multinomial(F.softmax(2 * scores, dim=0), 1)])
        return "".join(ALPHABET[number] for number in text.tolist())


def width_for(parameters: int) -> int:
    """Width at which the model has about so many parameters: 12 width**2 a layer, nearly all."""
    return max(HEADS, round(math.sqrt(parameters / (12 * LAYERS)) / HEADS) * HEADS)


# ---- the training -----------------------------------------------------------------------------


def count(text: str) -> int:
    """A number that may end in k or M: ``200k``, ``10M``."""
    factor = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    return int(float(text.rstrip("kKmM")) * factor)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on Python's standard library.")
    parser.add_argument("--steps", type=int, default=200, help="steps to train (default 200)")
    parser.add_argument("--params", type=count, default="200k", help="model size (default 200k)")
    parser.add_argument("--batch-size", type=int, default=8, help="passages a rank (default 8)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--text", type=count, default="500k", help="characters to learn from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)

    job = hpcft.init()

    text = encode(standard_library(args.text))
    # The last twentieth is held out, to see how well the model does on what it has not learnt.
    held_out = Passages(text[-max(len(text) // 20, CONTEXT + 1) :])
    passages = Passages(text[: -len(held_out.text)])
    model = DistributedDataParallel(LanguageModel(width_for(args.params)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)
    sampler = hpcft.ElasticBatchSampler(len(passages), batch_size=args.batch_size, seed=args.seed)
    loader = DataLoader(passages, batch_sampler=sampler)

    # Whatever has a state_dict can be tracked; the scheduler's position survives like the rest.
    state = hpcft.State(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)

    def train(state: hpcft.State) -> None:
        while state.step < args.steps:
            for text, following in loader:
                scores = model(text)
                loss = F.cross_entropy(scores.flatten(0, 1), following.flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                state.commit(loss=loss.item())
                if state.step >= args.steps:
                    break

    def evaluate(state: hpcft.State) -> dict[str, float]:
        # With --spares-do evaluate a spare calls this for each new checkpoint.
        losses = [
            F.cross_entropy(model.module(text).flatten(0, 1), following.flatten(), reduction="sum")
            for text, following in DataLoader(held_out, batch_size=64)
        ]
        loss = sum(losses).item() / (len(held_out) * CONTEXT)
        return {"loss": loss, "perplexity": math.exp(loss)}

    job.run(train, state, evaluate)

    if job.rank == 0:
        size = sum(p.numel() for p in model.parameters())
        model.eval()
        with torch.no_grad():
            loss = evaluate(state)["loss"]
        print(f"On text it has not learnt from its loss is {loss:.3f}.")
        print(f"A model of {size:,} parameters after {state.step} steps. What it writes now:")
        print(model.module.write("def ", 120))


if __name__ == "__main__":
    main()
