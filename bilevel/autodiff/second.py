"""Whether a backward of the user's own has the derivative that differences of it have.

A backward that detaches, or computes with numbers, is differentiated in silence: terms are lost.
Torch cannot tell it from one that is constant. So where such a function is first met in what is
differentiated twice, one derivative along a random direction is compared with a difference.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.graphs import recording, variables
from bilevel.autodiff.junctions import pulled
from bilevel.errors import ConvergenceWarning
from bilevel.tree import Tree

_found: WeakKeyDictionary[type, str] = WeakKeyDictionary()  # what is wrong with a function, or ""


def compare_second(
    function: Callable[..., Tree],
    arguments: tuple[Tree, ...],
    own: set[type],
    name: str,
    *,
    first: bool = False,
) -> None:
    """Warn where the second derivative of `function` is not that of its gradient.

    Args:
        function: of trees.
        arguments: near which; detached or not.
        own: functions with a backward of the user's own that it uses.
        name: what to call it.
        first: whether it is the gradient in the first argument alone that is differentiated.
    """
    leaves = [x for x in tree.leaves_of(arguments) if tree.is_variable(x)]
    if not leaves or max(torch.finfo(x.dtype).eps for x in leaves) > 1e-5:
        return  # no difference is good for anything
    new = {one for one in own if one not in _found}
    if new:
        devices = {x.device for x in leaves if x.is_cuda}
        with torch.random.fork_rng(devices), recording(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                lost = _lost(function, arguments, first=first)
            except (ValueError, RuntimeError, ArithmeticError):  # outside of its domain, say
                return
        for one in new:
            _found[one] = (
                f"its derivative is {lost[0]:.3g} along a random direction where differences give "
                f"{lost[1]:.3g}"
                if lost
                else ""
            )
    for one in own:
        if said := _found[one]:
            warnings.warn(
                f"{name} is differentiated twice, and the backward of {one.__name__} loses terms, "
                f"as by a detach() in it: {said}. Write it in differentiable operations, or take "
                "a method that differentiates once, such as Penalty().",
                ConvergenceWarning,
                stacklevel=2,
            )


def _lost(
    function: Callable[..., Tree], arguments: tuple[Tree, ...], *, first: bool
) -> tuple[float, float] | None:
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        if not tree.is_variable(x):
            return None
        kind = torch.complex128 if x.is_complex() else torch.float64
        return torch.randn(x.shape, generator=generator, dtype=kind, device="cpu").to(x)

    def moved(by: Tree, size: float) -> Tree:
        # Beside the point given, where as at zero the terms may vanish.
        return tree.map_leaves(lambda x, d: x if d is None else x.detach() + size * d, given, by)

    given = tree.detach(arguments)
    numbers = sum(x.numel() for x in tree.leaves_of(given) if tree.is_variable(x))
    scale = max(tree.norm(given), 1e-3) / math.sqrt(max(numbers, 1))
    given = moved(tree.map_leaves(drawn, given), 0.1 * scale)
    along, weight = tree.map_leaves(drawn, given), tree.map_leaves(drawn, given)
    if first:
        weight = weight[0], *tree.map_leaves(lambda v: None if v is None else 0 * v, weight[1:])
    out: Tree = None

    def gradient(point: Tree, *, keep: bool = False) -> tuple[list[Tensor], list[Any]]:
        nonlocal out
        torch.manual_seed(0)  # what it draws, it draws again
        point = variables(point)
        value = function(*point)
        out = tree.map_leaves(drawn, value) if out is None else out
        xs = [x for x in tree.leaves_of(point) if tree.is_variable(x)]
        total = tree.inner(value, out)
        return xs, [*pulled([total], xs, None, create_graph=keep, retain_graph=None)]

    def weighed(slopes: list[Any]) -> Tensor:
        vs = [v for v in tree.leaves_of(weight) if v is not None]
        return tree.inner(
            [v for v, s in zip(vs, slopes, strict=True) if s is not None],
            [s for s in slopes if s is not None],
        )

    xs, slopes = gradient(given, keep=True)
    slope = weighed(slopes)
    found = 0.0
    if slope.requires_grad:
        ds = [d for d in tree.leaves_of(along) if d is not None]
        again = pulled([slope], xs, None, create_graph=False, retain_graph=None)
        found = sum(
            float(tree.inner(g, d)) for g, d in zip(again, ds, strict=True) if g is not None
        )
    eps = max(torch.finfo(x.dtype).eps for x in xs)
    differences = []
    for h in (eps ** (1 / 3) * scale, eps ** (1 / 3) * scale / 2):
        up, down = (weighed(gradient(moved(along, way))[1]) for way in (h, -h))
        differences.append(float(up - down) / (2 * h))
    coarse, fine = differences
    size = max(abs(found), abs(fine), 1e3 * eps ** (2 / 3) * abs(float(slope)) / scale)
    rounding = 10 * math.sqrt(eps) * size
    settled = abs(coarse - fine) <= rounding  # no kink, and no draws of elsewhere
    return (found, fine) if settled and abs(found - fine) > 10 * rounding else None
