"""Where the generators stand that a run draws from: torch's, Python's, NumPy's, and its own."""

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch

from bilevel.sweeps.randomness import RandomState

_DEEP = 6  # how far generators are looked for: loader, sampler, data set, transform, ...
_ENTRIES = 64  # of a list or dict that are looked at


@dataclass(frozen=True)
class Standing:
    """Where the default generators stand: torch's, Python's, and NumPy's where it is loaded.

    Attributes:
        ours: of torch.
        python: of `random`.
        numpy: of `numpy.random`, None where it is not loaded.
    """

    ours: RandomState
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> "Standing":
        """The present ones."""
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        numpy = sys.modules.get("numpy")
        return cls(
            RandomState.capture(torch.device("cuda", i) for i in gpus),
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def restore(self) -> None:
        """Set them to this."""
        self.ours.restore()
        random.setstate(self.python)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy is not None:
            numpy.random.set_state(self.numpy)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            **self.ours.state_dict(),
            "python": _words(self.python),
            "numpy": None if self.numpy is None else _packed(self.numpy),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Standing":
        """What `state_dict` gave."""
        numpy = None if state["numpy"] is None else _unpacked(state["numpy"])
        return cls(RandomState.of(state), _tuple(state["python"]), numpy)


def _words(state: Any) -> Any:
    """A state of Python's generator, its 625 words as a tensor."""
    version, words, gauss = state
    return version, torch.tensor(words, device="cpu"), gauss


def _tuple(state: Any) -> Any:
    version, words, gauss = state
    return version, tuple(words.tolist()), gauss


def _packed(state: Any) -> Any:
    """A state of NumPy's old generator, its words as a tensor that every version stores."""
    name, keys, *rest = state
    return name, torch.from_numpy(keys.astype("int64")), *rest


def _unpacked(state: Any) -> Any:
    name, keys, *rest = state
    return name, keys.numpy().astype("uint32"), *rest


class Generators:
    """Generators that objects hold: a loader, its sampler, a function that closes over one."""

    def __init__(self, *roots: Any) -> None:
        """Those of the roots, by where they are."""
        self._found: dict[str, Any] = {}
        self._seen: set[int] = set()
        for i, root in enumerate(roots):
            self._look(root, str(i), _DEEP)

    def state_dict(self) -> dict[str, Any]:
        """Where each of them stands."""
        return {place: _state(one) for place, one in self._found.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set each to where it stood."""
        for place, one in self._found.items():
            if place in state:
                _set(one, state[place])

    def _look(self, value: Any, place: str, depth: int) -> None:
        if id(value) in self._seen or depth < 0 or isinstance(value, torch.Tensor | str | type):
            return
        self._seen.add(id(value))
        if _is_generator(value):
            self._found[place] = value
        elif isinstance(value, Mapping):
            parts = list(value.items())[:_ENTRIES]
            self._each(parts, place, depth)
        elif isinstance(value, list | tuple):
            self._each(enumerate(value[:_ENTRIES]), place, depth)
        elif isinstance(value, partial):
            self._each(
                (("func", value.func), ("args", value.args), *value.keywords.items()), place, depth
            )
        elif isinstance(value, MethodType):
            self._each((("self", value.__self__), ("func", value.__func__)), place, depth)
        elif isinstance(value, FunctionType):
            self._each(_caught(value), place, depth)
        elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
            self._each(list(vars(value).items()), place, depth)

    def _each(self, parts: Any, place: str, depth: int) -> None:
        for name, part in parts:
            self._look(part, f"{place}.{name}", depth - 1)


def _caught(function: FunctionType) -> list[tuple[str, Any]]:
    """What a function closes over, its defaults, and generators among the globals it names."""
    code, found = function.__code__, []
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not filled yet
            continue
    found += [("defaults", function.__defaults__ or ())]
    named = ((name, function.__globals__.get(name)) for name in code.co_names)
    return found + [(name, value) for name, value in named if _is_generator(value)]


def _is_generator(value: Any) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, numpy.random.Generator | numpy.random.RandomState
    )


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _words(generator.getstate())
    bits = getattr(generator, "bit_generator", None)
    return _packed(generator.get_state()) if bits is None else bits.state


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_tuple(state))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(_unpacked(state))
