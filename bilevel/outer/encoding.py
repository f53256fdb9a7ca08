"""State as named tensors and JSON, and back: no pickle, so that a file can only be data."""

import json
import math
import sys
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import StorageError, StructureError, UnsupportedError
from bilevel.tree import Tree

Records = Mapping[str, type]  # dataclasses that a state may hold, by their names
_PACKED = {"float": torch.float64, "int": torch.int64, "bool": torch.bool}
_FREE = ("checkpointing", "on_failure")  # settings that leave the numbers alone
_LISTED = 100  # entries of a list that are compared one by one
_DICTS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}


class Encoder:
    """Takes a state apart.

    Attributes:
        tensors: contiguous, on the CPU, by the place they had, none sharing memory with the state.
    """

    def __init__(self, records: Records) -> None:
        """A state may hold these records."""
        self._kinds = {kind: name for name, kind in records.items()}
        self.tensors: dict[str, Tensor] = {}

    def plain(self, value: Any, place: str) -> Any:
        """`value` as JSON writes it, its tensors left out.

        Args:
            value: None, numbers, text, tensors, and lists, tuples, dicts and records of them.
            place: where it stands in the state, for messages and as the names of tensors.

        Returns:
            Plain values.

        Raises:
            UnsupportedError: if it is something else; the message names the place.
        """
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if type(value) in (list, tuple):
            kind = _packable(value)
            if kind is not None:  # a history: bits, not text
                bits = torch.tensor(value, dtype=_PACKED[kind], device="cpu")
                packed = self._tensor(bits, place)
                return {"packed": packed, "of": kind, "tuple": isinstance(value, tuple)}
            parts = [self.plain(x, f"{place}.{i}") for i, x in enumerate(value)]
            return {"tuple": parts} if isinstance(value, tuple) else parts
        if type(value) in (*_DICTS.values(), defaultdict):
            pairs = [
                [self.plain(k, f"{place}.key"), self.plain(v, f"{place}.{k}")]
                for k, v in value.items()
            ]
            return {"dict": pairs, "kind": type(value).__name__}
        if type(value) in self._kinds:
            parts = {f.name: getattr(value, f.name) for f in fields(value)}
            return {
                "record": self._kinds[type(value)],
                "fields": {n: self.plain(v, f"{place}.{n}") for n, v in parts.items()},
            }
        return self._array(value, place)

    def _array(self, value: Any, place: str) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            return self.plain(value.item(), place)
        if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "fiubc":
            return {"array": self._tensor(torch.from_numpy(value.copy()), place)}
        raise UnsupportedError(
            f"{place} holds a {type(value).__name__}, and what is kept must be tensors, numbers, "
            "text, None, and lists, tuples and dicts of them: leave it out of the state_dict, or "
            "turn it into such values there."
        )

    def _tensor(self, value: Tensor, place: str) -> Any:
        if value.layout != torch.strided or value.is_quantized:
            raise UnsupportedError(f"{place} must be a dense tensor, got one of {value.layout}.")
        name = place
        while name in self.tensors:
            name += "'"
        plain = value.detach().resolve_conj().resolve_neg()
        about: dict[str, Any] = {"tensor": name}
        if plain.device.type != "cpu":
            about["device"] = str(plain.device)
        if 0 in plain.stride() and plain.numel():  # an expanded one, kept without its copies
            about["expand"] = list(plain.shape)
            plain = plain[tuple(slice(None) if step else slice(1) for step in plain.stride())]
        if not plain.is_contiguous() and _is_dense(plain):
            about["stride"] = list(plain.stride())  # kernels, and so last bits, may depend on it
        if plain.is_complex():
            about["complex"] = True
            plain = torch.view_as_real(plain)
        # Contiguous memory of its own: the loop goes on in that of the state.
        copy = torch.empty(plain.shape, dtype=plain.dtype, device="cpu")
        self.tensors[name] = copy.copy_(plain)
        return about


def _packable(value: list[Any] | tuple[Any, ...]) -> str | None:
    """The kind of its numbers, if it is long and they are all of one kind."""
    kinds = {type(x) for x in value} if len(value) > 8 else set()
    kind = kinds.pop().__name__ if len(kinds) == 1 else ""
    if kind == "int" and max(value, key=abs).bit_length() > 63:
        return None
    return kind if kind in _PACKED else None


def _is_dense(x: Tensor) -> bool:
    """Whether its entries lie in memory without a gap and each once."""
    reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return 0 not in x.stride() and reach == x.numel()


def decoded(value: Any, tensors: Mapping[str, Tensor], records: Records) -> Any:
    """The state that `Encoder.plain` took apart.

    Args:
        value: what it returned.
        tensors: what it gathered.
        records: as it was told.

    Returns:
        The state; its tensors are on the devices where they were.

    Raises:
        StorageError: if it is not what `Encoder` wrote.
    """
    if isinstance(value, list):
        return [decoded(x, tensors, records) for x in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"float": text}:
            return float(text)
        case {"packed": packed, "tuple": is_tuple}:
            numbers = decoded(packed, tensors, records).tolist()
            return tuple(numbers) if is_tuple else numbers
        case {"tuple": parts}:
            return tuple(decoded(x, tensors, records) for x in parts)
        case {"dict": pairs, "kind": kind}:
            items = ((decoded(k, tensors, records), decoded(v, tensors, records)) for k, v in pairs)
            return _DICTS.get(kind, dict)(dict(items))
        case {"record": name, "fields": parts} if name in records:
            return records[name](**{n: decoded(v, tensors, records) for n, v in parts.items()})
        case {"array": packed}:
            return decoded(packed, tensors, records).numpy()
        case {"tensor": name} if name in tensors:
            return _placed(tensors[name], value)
    raise StorageError(f"{json.dumps(value)[:80]} is no part of a state that this version keeps.")


def _placed(kept: Tensor, about: Mapping[str, Any]) -> Tensor:
    # A copy: memory of its own is aligned, which vectorised kernels may feel in the last bit.
    found = torch.view_as_complex(kept.clone()) if about.get("complex") else kept.clone()
    if "stride" in about:
        strided = torch.empty_strided(found.shape, about["stride"], dtype=found.dtype)
        found = strided.copy_(found)
    found = found.to(about.get("device", "cpu"))
    return found.expand(about["expand"]) if "expand" in about else found


class Trees:
    """Trees of known structures, whose nodes no file knows, as their leaves."""

    def __init__(self, **like: Tree) -> None:
        """Their structures, by names for messages."""
        self._like = {name: tree.flatten(value)[1] for name, value in like.items()}

    def kept(self, value: Tree) -> dict[str, Any]:
        """A tree taken apart; one of another structure must be of dicts, lists and tuples."""
        leaves, structure = tree.flatten(value)
        for name, known in self._like.items():
            if structure == known:
                return {"like": name, "leaves": leaves}
        return {"like": None, "leaves": value}

    def restored(self, kept: Mapping[str, Any]) -> Tree:
        """The tree that `kept` took apart.

        Args:
            kept: what it returned.

        Returns:
            The tree.

        Raises:
            StructureError: if it has more or fewer leaves than the one of its name.
        """
        if kept["like"] is None:
            return kept["leaves"]
        structure = self._like[kept["like"]]
        if structure.num_leaves != len(kept["leaves"]):
            raise StructureError(
                f"{kept['like']} were kept with {len(kept['leaves'])} leaves and have "
                f"{structure.num_leaves}: they are of another problem; start anew in another "
                "folder."
            )
        return tree.unflatten(structure, kept["leaves"])


def columns(records: Sequence[Any]) -> dict[str, Any]:
    """Many dataclasses of one kind as one list a field, equal values once."""
    found: dict[str, Any] = {"n": len(records)}
    for field in fields(records[0]) if records else ():
        values = [getattr(one, field.name) for one in records]
        if not all(type(x) is float for x in values):
            texts = [repr(x) for x in values]
            firsts = {text: i for i, text in reversed([*enumerate(texts)])}
            known = {text: k for k, text in enumerate(firsts)}
            values = {"of": [values[i] for i in firsts.values()], "at": [known[t] for t in texts]}
        found[field.name] = values
    return found


def rows(kind: type, kept: Mapping[str, Any]) -> list[Any]:
    """The dataclasses that `columns` took apart."""
    each = {
        name: values if isinstance(values, list) else [values["of"][k] for k in values["at"]]
        for name, values in kept.items()
        if name != "n"
    }
    return [kind(**{n: v[i] for n, v in each.items()}) for i in range(kept["n"])]


def first_not_finite(tensors: Mapping[str, Tensor], places: tuple[str, ...]) -> str | None:
    """The name of a tensor, below one of the places, with an infinite or NaN entry."""
    for name, value in tensors.items():
        # The sum is finite where all entries are, but for overflow: a cheap first look.
        if (
            name.startswith(places)
            and value.is_floating_point()
            and not math.isfinite(float(value.sum()))
            and not bool(value.isfinite().all())
        ):
            return name
    return None


def described(value: Any) -> Any:
    """Settings as plain values that can be compared after JSON: records, functions, classes."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Tensor):
        return tree.kind(value)
    if isinstance(value, list | tuple) and len(value) <= _LISTED:
        return [described(x) for x in value]
    if isinstance(value, list | tuple | Mapping) and len(value) > _LISTED:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    # What is not frozen is no setting: it may count, or remember.
    parameters: Any = getattr(value, "__dataclass_params__", None)
    if is_dataclass(value) and parameters.frozen and not isinstance(value, type):
        shown = {
            f.name: getattr(value, f.name) for f in fields(value) if f.repr and f.name not in _FREE
        }
        return {"": type(value).__name__, **{n: described(v) for n, v in shown.items()}}
    return _callable(value) if callable(value) else type(value).__name__


def _callable(value: Any) -> str:
    """A function by its name and its code, so that an edited one is another."""
    inner = getattr(value, "func", None)  # functools.partial
    if inner is not None and not hasattr(value, "__code__"):
        return f"partial of {_callable(inner)}"
    code = getattr(value, "__code__", None)
    if code is None:
        kind = value if isinstance(value, type) else type(value)
        return kind.__qualname__
    return f"{value.__qualname__} ({_code(code):08x})"


def _code(code: Any) -> int:
    found = zlib.crc32(code.co_code)
    for constant in code.co_consts:
        text = repr(constant)
        if hasattr(constant, "co_code"):
            text = f"{_code(constant)}"
        elif isinstance(constant, frozenset):  # whose order is that of hashes, another each run
            text = repr(sorted(map(repr, constant)))
        found = zlib.crc32(text.encode(), found)
    return zlib.crc32(repr(code.co_names).encode(), found)
