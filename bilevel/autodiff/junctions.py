"""Graphs that are cut where processes meet, so that nothing is communicated inside of autograd.

A *junction* ends one graph and begins another: its leaves hold values that its sources gave, and
know how a cotangent of theirs becomes one of the sources. A *seam* hands it on as it is; at a
*meeting* each process evaluates a function of its own, and all take the mean. Pulling back goes
from junction to junction, in the same order on every process.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import graph
from torch.autograd.graph import Node
from torch.overrides import has_torch_function

from bilevel import shards, tree
from bilevel.tree import Tree

_KNOWN = "_bilevel_junction"  # of a leaf: its junction and its place there
_STANDS = "_bilevel_stands_for"  # of an alias: the tensor that it stands for
_engine: Any = getattr(graph, "_engine_run_backward", None)
_numbers = count()
_made: list[bool] = []  # empty as long as this process has no junction


class _Inside(threading.local):
    slopes = False  # whether only derivatives are looked at in this thread


_inside = _Inside()


class Mean(Protocol):
    """What the processes hold, summed over them and divided by their number."""

    def mean(self, values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """None where every process has None; a process that has None counts as zero."""
        ...

    def whole(self, value: Tensor) -> Tensor:
        """All of a tensor of which each process may hold a part; detached."""
        ...


class Junction:
    """Where a graph ends and the next begins.

    Attributes:
        number: later junctions have larger ones.
        sources: what a cotangent is handed on to.
        behind: tensors whose graphs led here.
    """

    def __init__(self, sources: Sequence[Tensor], behind: Sequence[Tensor]) -> None:
        """Begin with no leaves."""
        if not _made:
            _made.append(True)
        self.number, self.sources, self.behind = next(_numbers), list(sources), list(behind)
        self.size = 0

    def leaf(self, value: Tensor) -> Tensor:
        """A leaf of the next graph, of this value."""
        found = value.detach().requires_grad_()
        setattr(found, _KNOWN, (self, self.size))
        self.size += 1
        return found

    def reverse(self, cotangents: list[Tensor | None], *, create_graph: bool) -> list[Any]:  # noqa: ARG002
        """One cotangent a source, of those of the leaves; here the same ones."""
        return cotangents


class Meeting(Junction):
    """Where each process has evaluated a function of its own, and all took the mean."""

    def __init__(
        self, among: Mean, sources: list[Tensor], aliases: list[Tensor], outputs: list[Any]
    ) -> None:
        """Keep the graph of the `outputs` in the `aliases`, which stand for the `sources`."""
        theirs = [y for y in outputs if y is not None and y.requires_grad]
        super().__init__(sources, [*theirs, *sources])
        self._among, self._aliases, self._outputs = among, aliases, outputs

    def reverse(self, cotangents: list[Tensor | None], *, create_graph: bool) -> list[Any]:
        """Pulled through the function of this process, and the mean of that."""
        # As the mean over K processes divides by K, so does that of the cotangents; hence nothing
        # is divided here.
        # Those that have a graph stand as aliases in that of this function, which is kept.
        vs = [None if v is None else self._among.whole(v) for v in cotangents]
        attached = [v is not None and v.requires_grad and create_graph for v in cotangents]
        given = [
            _alias(x, v) if open_ and x is not None and v is not None else v
            for x, v, open_ in zip(cotangents, vs, attached, strict=True)
        ]
        pairs = [
            (y, v)
            for y, v in zip(self._outputs, given, strict=True)
            if v is not None and y is not None and y.requires_grad
        ]
        found: list[Tensor | None] = [None] * len(self._aliases)
        if pairs:
            ys, seeds = zip(*pairs, strict=True)
            found = [
                *torch.autograd.grad(
                    ys,
                    self._aliases,
                    seeds,
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                )
            ]
        means = self._among.mean([g if g is None else g.detach() for g in found], self.sources)
        if not create_graph:
            return means
        more = [(x, v) for x, v, open_ in zip(cotangents, given, attached, strict=True) if open_]
        sources = [*self.sources, *(x for x, _ in more if x is not None)]
        aliases = [*self._aliases, *(v for _, v in more if v is not None)]
        again = Meeting(self._among, sources, aliases, [])
        return again.met(found, means)

    def met(self, outputs: list[Tensor | None], means: list[Tensor | None]) -> list[Tensor | None]:
        """The means as leaves, of these outputs."""
        places = [i for i, mean in enumerate(means) if mean is not None]
        self._outputs = [outputs[i] for i in places]
        self.behind += [y for y in self._outputs if y is not None and y.requires_grad]
        return [mean if mean is None else self.leaf(mean) for mean in means]


class slopes_only:  # noqa: N801 - a context, of which each small step enters one
    """Inside, nobody looks at the value that a meeting comes to, only at its derivative."""

    def __enter__(self) -> None:
        self._outside = _inside.slopes
        _inside.slopes = True

    def __exit__(self, *_: object) -> None:
        _inside.slopes = self._outside


def slopes_wanted() -> bool:
    """Whether it is so."""
    return _inside.slopes


def meeting(function: Callable[..., Tensor], among: Mean, *arguments: Tree) -> Tensor:
    """The mean of a function that each process evaluates with data of its own.

    Args:
        function: of the arguments, which are the same on every process; real scalar.
        among: the processes.
        arguments: trees; where a graph is recorded, and they require grad, the mean does.

    Returns:
        The mean. Its graph ends here, and goes on from the arguments.
    """
    sources: list[Tensor] = []
    aliases: dict[int, Tensor] = {}

    def alias(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in aliases:
            own = among.whole(x)
            if torch.is_grad_enabled() and x.requires_grad:
                own = _alias(x, own)
                sources.append(x)
            aliases[id(x)] = own
        return aliases[id(x)]

    given = [tree.map_leaves(alias, argument) for argument in arguments]
    value = function(*given)
    unseen = sources and slopes_wanted()
    mean = value.detach() if unseen else among.mean([value.detach()], [value])[0]
    if not sources:
        return value.detach() if mean is None else mean
    found = Meeting(among, sources, [x for x in aliases.values() if x.requires_grad], [value])
    return found.leaf(value if mean is None else mean)


def _alias(x: Tensor, value: Tensor | None = None) -> Tensor:
    """A leaf that stands for a tensor inside of a meeting; nothing is pulled back through it."""
    own = (x if value is None else value).detach().requires_grad_()
    setattr(own, _STANDS, x)
    return own


def seam(values: Tree) -> Tree:
    """The values, their graph cut here, so that it is pulled back piece by piece."""
    computed = [
        x
        for x in tree.leaves_of(values)
        if isinstance(x, Tensor) and x.requires_grad and x.grad_fn is not None
    ]
    if not computed:
        return values
    joint, known = Junction(computed, computed), {id(x) for x in computed}
    return tree.map_leaves(lambda x: joint.leaf(x) if id(x) in known else x, values)


def behind(leaf: Tensor) -> list[Tensor]:
    """What the graph of a leaf goes on from; nothing where it begins there."""
    if not _made:
        return []
    if hasattr(leaf, _STANDS):
        return [getattr(leaf, _STANDS)]
    return getattr(leaf, _KNOWN)[0].behind if hasattr(leaf, _KNOWN) else []


def pulled(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    *,
    create_graph: bool,
    retain_graph: bool | None,
    batched: bool = False,
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` through junctions; where there are none it is just that."""
    crossing = _Crossing(inputs) if _made else None
    if crossing is None or not crossing.enter(outputs):
        return _grad(outputs, inputs, cotangents, retain_graph, create_graph, batched)
    given = [torch.ones_like(y) for y in outputs] if cotangents is None else cotangents
    with torch.set_grad_enabled(create_graph):  # sums of what arrives are part of the graph
        if not batched:
            return crossing.pull(outputs, given, create_graph=create_graph)
        rows = zip(*(v.unbind() for v in given), strict=True)
        found = [crossing.pull(outputs, row, create_graph=create_graph) for row in rows]
        return [None if g[0] is None else torch.stack([*g]) for g in zip(*found, strict=True)]  # pyright: ignore[reportArgumentType]


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    retain_graph: bool | None,
    create_graph: bool,
    batched: bool,
) -> Sequence[Tensor | None]:
    ys, xs = tuple(outputs), tuple(inputs)
    unfit = cotangents is None and any(y.ndim for y in ys)  # which is refused there
    if batched or unfit or _engine is None or has_torch_function(ys + xs):
        return torch.autograd.grad(
            *(ys, xs, cotangents, retain_graph, create_graph),
            allow_unused=True,
            is_grads_batched=batched,
        )
    # What that comes to for plain tensors, without a dozen questions in Python what they are.
    vs = tuple(map(torch.ones_like, ys)) if cotangents is None else tuple(cotangents)
    keep = create_graph if retain_graph is None else retain_graph
    return _engine(ys, vs, keep, create_graph, xs, True, accumulate_grad=False)


def crosses(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether there is a junction between outputs and inputs."""
    return bool(_made) and _Crossing(inputs).enter(outputs)


class _Crossing:
    """One pull through the junctions between outputs and inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = inputs
        self._leaves = {id(x) for x in inputs}
        self._nodes = {x.grad_fn for x in inputs if x.grad_fn is not None}
        self._junctions: dict[Junction, list[Tensor | None]] = {}
        # What the graph before a junction (None: before the outputs) begins with: leaves of others.
        self._begins: dict[Junction | None, list[Tensor]] = {}
        self._wanted: dict[Junction | None, bool] = {}
        # Junctions no later than that of every input lead to none. Without that, each step of a
        # long iteration would look back to its start.
        self._floor = min(
            getattr(x, _KNOWN)[0].number if hasattr(x, _KNOWN) else -1 for x in inputs
        )

    def enter(self, outputs: Sequence[Tensor]) -> bool:
        """Whether there is a junction on the way to an input."""
        waiting: list[tuple[Junction | None, Sequence[Tensor]]] = [(None, outputs)]
        while waiting:
            here, sources = waiting.pop()
            found, self._wanted[here] = self._walk(sources)
            begins = [x for x in found if getattr(x, _KNOWN)[0].number > self._floor]
            self._begins[here] = begins
            for leaf in begins:
                joint, place = getattr(leaf, _KNOWN)
                if joint not in self._junctions:
                    self._junctions[joint] = [None] * joint.size
                    waiting.append((joint, joint.sources))
                self._junctions[joint][place] = leaf
        for joint in sorted(self._junctions, key=lambda j: j.number):
            self._wanted[joint] |= any(map(self._leads, self._begins[joint]))
        return any(map(self._leads, self._begins[None]))

    def _leads(self, leaf: Tensor) -> bool:
        return self._wanted[getattr(leaf, _KNOWN)[0]]

    def _walk(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], bool]:
        """The leaves of junctions that a graph begins with, and whether it holds an input."""
        begins: dict[int, Tensor] = {}
        wanted = False
        seen, waiting = set[Node](), list[Node]()

        def met(leaf: Tensor) -> bool:
            if hasattr(leaf, _KNOWN):
                begins[id(leaf)] = leaf
            return id(leaf) in self._leaves

        for tensor in tensors:
            node = tensor.grad_fn
            wanted |= met(tensor) if node is None else id(tensor) in self._leaves
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
        while waiting:
            node = waiting.pop()
            wanted |= node in self._nodes
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and not node.next_functions:
                wanted |= met(leaf)
            for previous, _ in node.next_functions:
                if previous is not None and previous not in seen:
                    seen.add(previous)
                    waiting.append(previous)
        return [*begins.values()], wanted

    def pull(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Any], *, create_graph: bool
    ) -> list[Tensor | None]:
        """The gradients in the inputs, by the junctions, the last first."""
        totals: dict[int, Tensor] = {}
        self._flow(None, outputs, cotangents, totals, create_graph=create_graph)
        for joint in sorted(self._junctions, key=lambda j: -j.number):
            leaves = self._junctions[joint]
            arrived = [None if leaf is None else totals.get(id(leaf)) for leaf in leaves]
            if self._wanted[joint] and any(v is not None for v in arrived):
                handed = joint.reverse(arrived, create_graph=create_graph)
                self._flow(joint, joint.sources, handed, totals, create_graph=create_graph)
        return [totals.get(id(x)) for x in self._inputs]

    def _flow(
        self,
        joint: Junction | None,
        sources: Sequence[Tensor],
        cotangents: Sequence[Any],
        totals: dict[int, Tensor],
        *,
        create_graph: bool,
    ) -> None:
        """From the end of one graph to its beginning, added to the totals."""
        pairs = [(x, v) for x, v in zip(sources, cotangents, strict=True) if v is not None]
        leads = {id(x): x for x in self._begins[joint] if self._leads(x)}
        targets = [*{**leads, **{id(x): x for x in self._inputs}}.values()]
        if not pairs or not targets:
            return
        xs, vs = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            xs, targets, vs, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        for x, term in zip(targets, found, strict=True):
            if term is not None:
                term = shards.fitted(term, x)
                total = totals.get(id(x))
                totals[id(x)] = term if total is None else total + term
