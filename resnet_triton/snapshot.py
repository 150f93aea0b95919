"""Whether modules are still as they were: told in a fraction of the time that it takes to look at what they are.

Every call of a converted network must know that no attribute, hook, mode, child or weight changed since it was decided
what runs fused. Reading all of them through ``nn.Module.__getattr__`` takes the host longer than the GPU takes for a
small batch. A snapshot keeps the objects themselves, and compares identities in C.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from . import backend

T = TypeVar("T")


class Snapshot:
    """The classes, attributes, children, parameters and buffers of modules; it never holds where one has a hook."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.hooks: list[Any] = []
        self.members: list[dict[str, Any]] = []
        for m in self.modules:
            self.hooks += (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            self.members += (m._parameters, m._buffers, m._modules)
        self.types = list(map(type, self.modules))
        self.values = self._now()

    def _now(self) -> list[Any]:
        attributes = map(vars, self.modules)  # not kept: an object's __dict__ may be replaced as a whole
        return list(chain.from_iterable(map(dict.values, chain(attributes, self.members))))

    def holds(self) -> bool:
        """Whether all of it is the same, object by object, and nothing has a hook."""
        now = self._now()
        return (
            len(now) == len(self.values)
            and all(map(operator.is_, now, self.values))
            and list(map(type, self.modules)) == self.types
            and not any(self.hooks)
            and not torch_module._has_any_global_hook()
        )


class Remembered(Generic[T]):
    """A function of a module, computed again only when something below the module changed.

    Nothing is kept on the module, and what is kept goes with it. Where Dynamo traces, the function itself runs.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function = function
        self.known: WeakKeyDictionary[nn.Module, tuple[Snapshot, dict[str, Any], list[Any], tuple, T]]
        self.known = WeakKeyDictionary()

    def __call__(self, m: Any) -> T:
        """The function's value for a module that has no hooks itself."""
        if torch.compiler.is_compiling():
            return self.function(m)
        known = self.known.get(m)
        if known is not None:
            snapshot, children, were, state, value = known
            same = m._modules is children and list(children.values()) == were and backend.state() == state
            if same and snapshot.holds():
                return value
        value = self.function(m)
        below = [child for child in m.modules() if child is not m]
        plain = all(isinstance(t, nn.Parameter) for child in below for t in child._parameters.values() if t is not None)
        snapshot = Snapshot(below)
        if plain and snapshot.holds():  # no hook, and not the tensors of one torch.func.functional_call
            self.known[m] = (snapshot, m._modules, list(m._modules.values()), backend.state(), value)
        else:
            self.known.pop(m, None)
        return value
