"""What training consists of, and its movement from rank to rank."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from hpcft.ckpt import device
from hpcft.ckpt.spec import Spec
from hpcft.ckpt.tree import is_sharded, local
from hpcft.errors import HpcftError


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in a state's skeleton.

    device: the kind of device it is on; which of them is every rank's own affair.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Slot:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.device.type)


@dataclass
class Contents:
    """A state taken apart.

    skeleton: the state with a Slot for each tensor; can be pickled.
    tensors: the tensors, in the order of their slots; they alias the live ones where possible.
    """

    skeleton: Any
    tensors: list[torch.Tensor]


class State:
    """Everything that must survive: model, optimizer, and whatever else training goes on from.

    ::

        state = hpcft.State(model=model, optimizer=optimizer, scheduler=scheduler, best=0.0)

    Arguments with ``state_dict`` and ``load_state_dict`` (modules, optimizers, schedulers,
    samplers) are *parts*. All others are plain values, read and set as attributes
    (``state.best``); they must be picklable, and replaced rather than changed in place. What is
    not in the state does not survive: a rank that is adopted has it as it was built.

    Random numbers: at the beginning of every step the generators of torch, numpy and random are
    seeded from (the job's seed, logical rank, step), so that whoever plays a rank draws what it
    would have drawn.

    Parameters
    ----------
    parts: what to track, by name.

    Attributes
    ----------
    step: number of steps committed.
    """

    def __init__(self, **parts: Any) -> None:
        set_ = super().__setattr__
        set_("parts", {})
        set_("values", {})
        set_("step", 0)
        set_("_commit", None)
        set_("_save", None)
        for name, part in parts.items():
            if hasattr(type(self), name) or name in ("parts", "values", "step", "hpcft"):
                raise HpcftError(f"a state cannot have a part called {name!r}", "choose another")
            if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
                self.parts[name] = part
            else:
                self.values[name] = part

    # Declared for type checkers; set in __init__ past __setattr__.
    parts: dict[str, Any]
    values: dict[str, Any]
    step: int
    _commit: Callable[[dict[str, float]], None] | None
    _save: Callable[[bool], None] | None

    def __getattr__(self, name: str) -> Any:
        for store in ("values", "parts"):
            found = self.__dict__.get(store, {})
            if name in found:
                return found[name]
        raise AttributeError(f"the state has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            super().__setattr__(name, value)
        elif name in self.parts:
            raise AttributeError(f"{name!r} is tracked by the state and cannot be replaced")
        elif hasattr(type(self), name):
            raise AttributeError(f"{name!r} is a method of the state; choose another name")
        else:
            self.values[name] = value

    def commit(self, **metrics: float) -> None:
        """The step is done: everything tracked is as it shall be if training goes on from here.

        Parameters
        ----------
        metrics: numbers to show on the progress line, such as the loss.

        Raises
        ------
        StepInterrupted: somebody has failed; ``job.run`` handles it, let it pass.
        """
        if self._commit is None:
            raise HpcftError(
                "commit() was called outside job.run()", "call it in the train function"
            )
        self._commit(metrics)

    def save(self, overlap: bool = False) -> None:
        """Save a checkpoint of where training has come to, besides those that --ckpt-every brings.

        To be called in all ranks, right after :meth:`commit`. Returns when the state is copied and
        may change; it is written, and committed, while training goes on. Should it fail, that is
        told as for other checkpoints, and training goes on. One that is still under way when a rank
        fails is begun anew after the recovery.

        Parameters
        ----------
        overlap: return at once, and copy while the next step's forward and backward pass run; only
            ``optimizer.step()`` waits for what is left. Parameters must not change otherwise.

        Raises
        ------
        HpcftError: it is not the time, or there is no --ckpt-dir.
        StepInterrupted: somebody has failed; ``job.run`` handles it, let it pass.
        """
        if self._save is None:
            raise HpcftError("save() was called outside job.run()", "call it in the train function")
        self._save(overlap)

    # -- for the job ---------------------------------------------------------------------------

    def modules(self) -> Iterator[torch.nn.Module]:
        """The parts that are modules."""
        return (part for part in self.parts.values() if isinstance(part, torch.nn.Module))

    def optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """The parts that are optimizers."""
        return (part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer))

    def take_apart(self) -> Contents:
        """The state as skeleton and tensors."""
        tree = {
            "step": self.step,
            "values": self.values,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        leaves, spec = pytree.tree_flatten(tree)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        slots = [Slot.of(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        return Contents(pytree.tree_unflatten(slots, spec), tensors)

    def install(self, skeleton: Any, tensors: list[torch.Tensor]) -> None:
        """Take over a state received as skeleton and tensors; inverse of :meth:`take_apart`.

        Tensors that are the live ones already (received in place) are not copied again.
        """
        supply = iter(tensors)
        tree = pytree.tree_map(
            lambda leaf: next(supply) if isinstance(leaf, Slot) else leaf, skeleton
        )
        self.step = tree["step"]
        self.values.clear()
        self.values.update(tree["values"])
        for name, part in self.parts.items():
            content = tree["parts"][name]
            # load_state_dict would copy what is in place already.
            if isinstance(part, torch.optim.Optimizer) and _same(
                part.state_dict()["state"], content["state"]
            ):
                for live, new in zip(part.param_groups, content["param_groups"], strict=True):
                    live.update({k: v for k, v in new.items() if k != "params"})
            elif not (isinstance(part, torch.nn.Module) and _same(part.state_dict(), content)):
                part.load_state_dict(content)

    def to_tree(self, frozen: bool) -> dict[str, Any]:
        """The state as a checkpoint holds it: plain data and tensors, by part.

        Modules wrapped by DistributedDataParallel count as what they wrap.

        Parameters
        ----------
        frozen: copy what may change before the next ``optimizer.step()`` (buffers, values), so
            that the rest may be read until then.
        """
        content: dict[str, Any] = {"values": self.values}
        for name, part in self.parts.items():
            content[name] = _bare(part).state_dict()
        if not frozen:
            return content
        lasting = {
            _address(tensor) for module in self.modules() for tensor in module.parameters()
        } | {
            _address(leaf)
            for optimizer in self.optimizers()
            for leaf in pytree.tree_leaves(optimizer.state_dict()["state"])
            if isinstance(leaf, torch.Tensor)
        }

        def freeze(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return leaf if _address(leaf) in lasting else leaf.clone()
            return leaf.copy() if isinstance(leaf, numpy.ndarray) else leaf

        return cast("dict[str, Any]", pytree.tree_map(freeze, content))

    def from_tree(self, step: int, content: dict[str, Any], optimizers: bool = True) -> None:
        """Take over what :meth:`to_tree` gave.

        Parameters
        ----------
        optimizers: what is of optimizers as well.

        Raises
        ------
        KeyError, ValueError, RuntimeError, TypeError: it is of another training.
        """
        if content.keys() - {"values"} != self.parts.keys():
            theirs, ours = sorted(content.keys() - {"values"}), sorted(self.parts)
            raise ValueError(f"it holds {', '.join(theirs)}, and not {', '.join(ours)}")
        for name, part in self.parts.items():
            if optimizers or not isinstance(part, torch.optim.Optimizer):
                _bare(part).load_state_dict(content[name])
        self.values.clear()
        self.values.update(content["values"])
        self.step = step

    def targets(self) -> Callable[[tuple[str | int, ...], Spec], torch.Tensor | None]:
        """Tells where leaves of a checkpoint are to go that are sharded or on a device, by their
        keys in its tree.

        That is the live tensor of the same keys; and for what an optimizer keeps, which it may not
        have yet: a tensor of the shape of its parameter is where, and sharded as, the parameter is.
        """
        live = dict(_particular(self.to_tree(frozen=False), ()))
        for name, part in self.parts.items():
            if isinstance(part, torch.optim.Optimizer):
                parameters = (p for group in part.param_groups for p in group["params"])
                for number, parameter in enumerate(parameters):
                    if _is_particular(parameter):
                        live[name, "state", number] = parameter.detach()

        def target(keys: tuple[str | int, ...], spec: Spec) -> torch.Tensor | None:
            found = live.get(keys)
            dtype = getattr(torch, spec.dtype)
            if found is not None and found.dtype == dtype:
                return found
            like = live.get(keys[:3]) if found is None else found
            if like is None or tuple(like.shape) != spec.shape:
                return None
            if not spec.shape and not is_sharded(like):
                # Rather a count of steps than a moment; where it is the optimizer knows.
                return None
            return torch.empty_like(like, dtype=dtype)

        return target

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all tensors of the tracked modules.

        Modules wrapped by DistributedDataParallel count as what they wrap.
        """
        sha = hashlib.sha256()
        for name, part in sorted(self.parts.items()):
            if isinstance(part, torch.nn.Module):
                for key, value in sorted(_bare(part).state_dict().items()):
                    if isinstance(value, torch.Tensor):
                        sha.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}\n".encode())
                        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                        sha.update(data.numpy().data)
        return sha.hexdigest()

    def buffers(self) -> list[torch.Tensor]:
        """Tensors a forward pass may change: the modules' buffers."""
        return [buffer for module in self.modules() for buffer in module.buffers()]

    def sharded(self) -> bool:
        """Whether a rank holds only its shard of something (FSDP, DTensor).

        That is a parameter, or what an optimizer keeps, as soon as it does so.
        """
        parameters = (p for module in self.modules() for p in module.parameters())
        kept = (leaf for o in self.optimizers() for leaf in pytree.tree_leaves(dict(o.state)))
        return any(map(is_sharded, chain(parameters, kept)))


def _particular(
    value: Any, keys: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], torch.Tensor]]:
    """The tensors in plain data that cannot be just anywhere, with the keys that lead there."""
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _particular(item, (*keys, key))
    elif _is_particular(value):
        yield keys, value


def _is_particular(value: Any) -> bool:
    """Whether it is a DTensor, or a tensor on a device."""
    return is_sharded(value) or (isinstance(value, torch.Tensor) and device.is_elsewhere(value))


def _address(tensor: torch.Tensor) -> int:
    """Where this rank's bytes of a tensor are."""
    return (local(tensor) if is_sharded(tensor) else tensor).data_ptr()


def _bare(part: Any) -> Any:
    """A part without the wrapper of DistributedDataParallel."""
    return part.module if isinstance(part, DistributedDataParallel) else part


def _same(live_tree: Any, new_tree: Any) -> bool:
    """Whether two trees hold the very same tensors, and equal numbers and texts besides."""
    live, new = pytree.tree_leaves(live_tree), pytree.tree_leaves(new_tree)

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return _address(a) == _address(b)
        plain = (bool, int, float, str, type(None))
        return type(a) is type(b) and isinstance(a, plain) and a == b

    return len(live) == len(new) and all(map(same, live, new))


class Savepoint:
    """The small things a step that is broken off may have changed already.

    Parameters, and what the optimizer keeps, change only in ``optimizer.step()``, and a step is
    broken off before that or after its commit. Buffers (running means), values and the gradients
    are changed on the way there.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._buffers = state.buffers()
        self._copies = [buffer.clone() for buffer in self._buffers]
        self._values = dict(state.values)

    def renew(self) -> None:
        """Remember the state as it is now."""
        for copy_, buffer in zip(self._copies, self._buffers, strict=True):
            copy_.copy_(buffer)
        self._values = dict(self._state.values)

    @contextlib.contextmanager
    def brought_back(self) -> Iterator[None]:
        """Within it buffers and values are what was remembered."""
        buffers, values = [buffer.clone() for buffer in self._buffers], dict(self._state.values)
        self._bring_back()
        try:
            yield
        finally:
            for buffer, copy_ in zip(self._buffers, buffers, strict=True):
                buffer.copy_(copy_)
            self._state.values.clear()
            self._state.values.update(values)

    def _bring_back(self) -> None:
        for copy_, buffer in zip(self._copies, self._buffers, strict=True):
            buffer.copy_(copy_)
        self._state.values.clear()
        self._state.values.update(copy.copy(self._values))

    def restore(self) -> None:
        """Bring back what was remembered, and drop the gradients."""
        self._bring_back()
        for optimizer in self._state.optimizers():
            optimizer.zero_grad(set_to_none=True)


def dump(skeleton: Any) -> bytes:
    """A skeleton as bytes."""
    return pickle.dumps(skeleton)


def load(data: bytes) -> Any:
    """The inverse of :func:`dump`."""
    return pickle.loads(data)
