"""Trees of tensors as a real vector space with the inner product Re<a, b>.

A tree is a tensor, or a dict, tuple, list or named tuple of trees. Its floating-point and complex
leaves are its *variables*; integer and boolean leaves are carried along unchanged. A *vector* of
the space (a gradient, a multiplier) has the structure of the tree, with None where the tree has a
leaf that is not a variable.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel import shards
from bilevel.errors import StructureError, UnsupportedError

Tree = Any  # a tensor, or a dict / tuple / list of trees
NAMESPACE = "bilevel"
_A_LEAF: Any = 0
_ONE_LEAF = optree.tree_structure(_A_LEAF, none_is_leaf=True, namespace=NAMESPACE)

# A tree that is one tensor takes a short way through each of these: small steps feel it.


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Leaves of `tree`, None included, and the structure that puts them back."""
    if isinstance(tree, Tensor):
        return [tree], _ONE_LEAF
    leaves, structure = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    return leaves, structure


def unflatten(structure: optree.PyTreeSpec, leaves: list[Any]) -> Tree:
    """The tree of `structure` with `leaves`."""
    return leaves[0] if structure is _ONE_LEAF else optree.tree_unflatten(structure, leaves)


def leaves_of(tree: Tree) -> list[Any]:
    """Leaves of `tree`, None included."""
    if isinstance(tree, Tensor):
        return [tree]
    return optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)


def distinct_leaves(tree: Tree) -> list[Any]:
    """Leaves of `tree`, each object once."""
    return list({id(leaf): leaf for leaf in leaves_of(tree)}.values())


def map_leaves(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """`function` of each leaf of `tree` and the leaves of `others` in the same places."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    return optree.tree_map(function, tree, *others, none_is_leaf=True, namespace=NAMESPACE)


def leaf_names(tree: Tree, root: str) -> list[str]:
    """How Python code would reach each leaf, such as `control['tasks'][0]`."""
    return [accessor.codify(root) for accessor in flatten(tree)[1].accessors()]


def is_variable(leaf: Any) -> bool:
    """Whether `leaf` is a floating-point or complex tensor, so that a gradient exists."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def detach(tree: Tree) -> Tree:
    """`tree` without its autograd history; no copy but of tensors that inference mode made."""
    if isinstance(tree, Tensor):
        return detached(tree)
    return map_leaves(lambda leaf: detached(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def detached(x: Tensor) -> Tensor:
    """An alias without history; of a tensor of inference mode, which none can have, a copy."""
    return x.clone() if x.is_inference() else x.detach()


def copied(tree: Tree, *, only: Tree = None) -> Tree:
    """`tree` with tensors of its own; with `only`, of its own where it shares memory with that."""
    if only is None:
        return map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)
    theirs = {_memory(x) for x in leaves_of(only) if isinstance(x, Tensor)}
    return map_leaves(
        lambda x: x.clone() if isinstance(x, Tensor) and _memory(x) in theirs else x, tree
    )


def _memory(x: Tensor) -> int:
    """What tells the memory of a tensor; itself where it has none of its own to show."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or inside a torch.func transform
        return id(x)


def zeros_like(tree: Tree) -> Tree:
    """The zero vector of the space of `tree`."""
    return map_leaves(lambda leaf: torch.zeros_like(leaf) if is_variable(leaf) else None, tree)


def filled(vector: Tree, like: Tree) -> Tree:
    """`vector` with zeros where it has None and `like` a variable."""
    if isinstance(vector, Tensor) and isinstance(like, Tensor):
        return vector
    return map_leaves(
        lambda x, v: torch.zeros_like(x) if v is None and is_variable(x) else v, like, vector
    )


def negative(vector: Tree) -> Tree:
    """`-vector`."""
    return map_leaves(lambda leaf: None if leaf is None else -leaf, vector)


def add(a: Tree, b: Tree) -> Tree:
    """`a + b`."""
    return map_leaves(lambda x, y: None if x is None else x + y, a, b)


def subtract(a: Tree, b: Tree) -> Tree:
    """`a - b`, None in the places that hold no variable of `a`."""
    return map_leaves(lambda x, y: x - y if is_variable(x) else None, a, b)


def moved(values: Tree, direction: Tree, size: Any) -> Tree:
    """`values - size * direction`; None in the direction leaves a leaf as it is."""
    if isinstance(size, float | int):
        if isinstance(values, Tensor):
            return torch.sub(values, direction, alpha=size)
        return map_leaves(
            lambda x, d: x if d is None else torch.sub(x, d, alpha=size), values, direction
        )
    if isinstance(size, Tensor):
        return map_leaves(lambda x, d: x if d is None else x - size * d, values, direction)
    return map_leaves(lambda x, d, s: x if d is None else x - s * d, values, direction, size)


def inner(a: Tree, b: Tree) -> Tensor:
    """`Re<a, b>`, summed over the variables; differentiable."""
    terms = [
        (_real(x) * _real(y)).sum()
        if x.is_complex() and y.is_complex()
        else (x.real * y.real).sum()
        for x, y in zip(leaves_of(a), leaves_of(b), strict=True)
        if is_variable(x) and is_variable(y)
    ]
    return sum(terms[1:], terms[0]) if terms else torch.zeros((), device="cpu")


def norm(vector: Tree) -> float:
    """Euclidean norm of a vector; large and small entries neither over- nor underflow."""
    return math.hypot(*(_length(x) for x in leaves_of(vector) if is_variable(x)))


def _length(x: Tensor) -> float:
    if shards.is_shard(x):
        local: Any = x
        return shards.length(x, _length(local.to_local()))
    x = _real(x)
    size = float(torch.linalg.vector_norm(x))
    limits = torch.finfo(x.dtype)
    # Squares of the entries are far inside the range of the dtype: that is the rule.
    if limits.tiny**0.5 / limits.eps < size < limits.max**0.5 * limits.eps or not x.numel():
        return size
    largest = float(torch.linalg.vector_norm(x, math.inf))
    if not 0 < largest < math.inf:
        return size if math.isnan(size) else largest
    return largest * float(torch.linalg.vector_norm(x / largest))


def _real(x: Tensor) -> Tensor:
    """Real and imaginary parts along a last axis: torch is slow with complex tensors."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def check_leaves(tree: Tree, name: str) -> None:
    """Refuse a leaf whose gradient would be lost because it is not a tensor."""
    for i, leaf in enumerate(leaves_of(tree)):
        if not (leaf is None or isinstance(leaf, Tensor | int)):
            raise StructureError(
                f"{leaf_names(tree, name)[i]} must be a tensor (or an integer, which is carried "
                f"unchanged), got {type(leaf).__name__}; {_remedy(leaf)}."
            )
        if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
            raise UnsupportedError(
                f"{leaf_names(tree, name)[i]} must be a dense tensor, got one of layout "
                f"{leaf.layout}: pass to_dense(), or keep it as a field of the dynamics."
            )


def _remedy(leaf: Any) -> str:
    if isinstance(leaf, torch.nn.Module):
        return "bilevel.functional(module) gives its parameters as a tree, and a function of them"
    if isinstance(leaf, Iterator):
        return (
            "an iterator is read once: pass a list, or for the parameters of a module the tree "
            "that bilevel.functional(module) gives"
        )
    if is_dataclass(leaf):
        return "pass its fields as a dict, as vars() gives, or register its class with optree"
    if not hasattr(leaf, "__array__") and not isinstance(leaf, float | complex):
        return "leave it out, and let the functions close over it"
    return "wrap it with torch.as_tensor"


def alike(a: Tree, b: Tree) -> bool:
    """Whether two trees agree in structure, and their leaves in shape, dtype and device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    a_leaves, a_structure = flatten(a)
    b_leaves, b_structure = flatten(b)
    return a_structure == b_structure and all(map(_leaves_alike, a_leaves, b_leaves))


def _leaves_alike(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return alike(a, b) if both else type(a) is type(b)


def kind(leaf: Any) -> str:
    """What a leaf is, for an error: dtype, shape and device of a tensor, else its type."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    dtype = str(leaf.dtype).removeprefix("torch.")
    return f"{dtype}{list(leaf.shape)} on {leaf.device}"


def check_like(found: Tree, expected: Tree, name: str, source: str) -> None:
    """Refuse a tree that differs from another in structure, shape, dtype or device."""
    if alike(found, expected):
        return
    found_leaves, found_structure = flatten(found)
    leaves, structure = flatten(expected)
    if found_structure != structure:
        raise StructureError(f"{source}: {name} must be {structure}, got {found_structure}.")
    i = [*map(_leaves_alike, found_leaves, leaves)].index(False)
    path, old, new = leaf_names(expected, name)[i], leaves[i], found_leaves[i]
    raise StructureError(f"{source}: {path} must be {kind(old)}, got {kind(new)}.")
