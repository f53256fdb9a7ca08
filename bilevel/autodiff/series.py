"""Junctions whose functions are evaluated one after another, so that one graph lives at a time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.junctions import Junction, Mean, slopes_wanted
from bilevel.tree import Tree

# Of leaves that stand for the sources, and of whether the results need a graph: the results.
Piece = Callable[[list[Tensor], bool], list[Any]]


class Series(Junction):
    """The mean of several functions; each is evaluated again where a cotangent is pulled back."""

    def __init__(
        self, among: Mean, sources: list[Tensor], values: list[Tensor], pieces: Sequence[Piece]
    ) -> None:
        """Begin with no leaves; the `values` are those of the sources, whole."""
        super().__init__(sources, sources)
        self._among, self._values, self._pieces = among, values, pieces

    def reverse(self, cotangents: list[Tensor | None], *, create_graph: bool) -> list[Any]:
        """The mean of what each function pulls back."""
        vs = [None if v is None else self._among.whole(v) for v in cotangents]
        attached = [
            (i, v)
            for i, v in enumerate(cotangents)
            if create_graph and v is not None and v.requires_grad
        ]
        places = [i for i, _ in attached]
        pieces = [partial(_pulled, one, len(self.sources), vs, places) for one in self._pieces]
        values = [*self._values, *(v for i in places if (v := vs[i]) is not None)]
        means = mean_of(pieces, values, self._among, self.sources)
        if not create_graph:
            return means
        there = [i for i, mean in enumerate(means) if mean is not None]
        again = [partial(_some, one, there) for one in pieces]
        joint = Series(self._among, [*self.sources, *(v for _, v in attached)], values, again)
        return [mean if mean is None else joint.leaf(mean) for mean in means]


def _pulled(
    piece: Piece,
    n: int,
    cotangents: list[Tensor | None],
    places: list[int],
    leaves: list[Tensor],
    taped: bool,
) -> list[Any]:
    """What a piece pulls back to its first n leaves; the others are cotangents in these places."""
    seeds = [*cotangents]
    for i, leaf in zip(places, leaves[n:], strict=True):
        seeds[i] = leaf
    with torch.enable_grad():
        outputs = piece(leaves[:n], True)
        pairs = [
            (y, v)
            for y, v in zip(outputs, seeds, strict=True)
            if v is not None and y is not None and y.requires_grad
        ]
        if not pairs:
            return [None] * n
        ys, vs = zip(*pairs, strict=True)
        return [*torch.autograd.grad(ys, leaves[:n], vs, create_graph=taped, allow_unused=True)]


def _some(piece: Piece, places: list[int], leaves: list[Tensor], taped: bool) -> list[Any]:
    found = piece(leaves, taped)
    return [found[i] for i in places]


def mean_of(
    pieces: Sequence[Piece], values: list[Tensor], among: Mean, like: Sequence[Tensor]
) -> list[Tensor | None]:
    """The mean over pieces and processes, while one graph is held at a time."""
    totals: list[Any] = [None] * len(like)
    for piece in pieces:
        found = piece([v.detach().requires_grad_() for v in values], False)
        for i, term in enumerate(found):
            if term is not None:
                totals[i] = term.detach() if totals[i] is None else totals[i] + term.detach()
    return among.mean([t if t is None else t / len(pieces) for t in totals], like)


class _Replayed:
    """A function that draws, each time it is evaluated, what it drew at first."""

    def __init__(self, function: Callable[[list[Tensor]], Tensor]) -> None:
        self._function = function
        self._state: list[Any] | None = None

    def __call__(self, leaves: list[Tensor], taped: bool) -> list[Any]:  # noqa: ARG002
        gpus = sorted({x.device for x in leaves if x.is_cuda}, key=str)
        now = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus)]
        if self._state is None:
            self._state = now
            return [self._function(leaves)]
        _set(self._state, gpus)
        try:
            return [self._function(leaves)]
        finally:
            _set(now, gpus)


def _set(states: list[Any], gpus: list[torch.device]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(gpus, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def in_turn(functions: Sequence[Callable[..., Tensor]], among: Mean, *arguments: Tree) -> Tensor:
    """`meeting` of the mean of several functions, evaluated one after another.

    Args:
        functions: of the arguments; real scalars.
        among: the processes.
        arguments: trees; where a graph is recorded, and they require grad, the mean does.

    Returns:
        The mean. Its graph ends here: the functions are evaluated again where it is pulled back.
    """
    leaves, structure = tree.flatten(arguments)
    values = [among.whole(x) if isinstance(x, Tensor) else x for x in leaves]
    recorded = torch.is_grad_enabled()
    firsts: dict[int, int] = {}  # tensor -> its place among the sources
    sources: list[Tensor] = []
    for x in leaves:
        if recorded and isinstance(x, Tensor) and x.requires_grad and id(x) not in firsts:
            firsts[id(x)] = len(sources)
            sources.append(x)

    def of(function: Callable[..., Tensor], own: list[Tensor]) -> Tensor:
        given = [
            own[firsts[id(x)]] if id(x) in firsts else v
            for x, v in zip(leaves, values, strict=True)
        ]
        return function(*tree.unflatten(structure, given))

    pieces = [_Replayed(partial(of, function)) for function in functions]
    kept = [among.whole(x) for x in sources]
    if sources and slopes_wanted():
        unseen = torch.zeros_like(kept[0].real).sum()
        return Series(among, sources, kept, pieces).leaf(unseen)
    with torch.no_grad():
        found = [piece([*kept], False)[0] for piece in pieces]
        mean = torch.stack(found).mean(0)
        (whole,) = among.mean([mean], [mean])
    value = mean if whole is None else whole
    return Series(among, sources, kept, pieces).leaf(value) if sources else value
