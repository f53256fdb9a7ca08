"""A bilevel problem as the processes see it: each objective the mean of what each evaluates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, shards, tree
from bilevel.checks import check_scalar
from bilevel.dynamics.closures import buffers_kept
from bilevel.errors import ArgumentError, UnsupportedError
from bilevel.parallel.parts import has_samples, part_of
from bilevel.parallel.portions import Portion, own, portions
from bilevel.parallel.replicas import Replicas
from bilevel.sweeps.randomness import devices_of, preserved
from bilevel.tree import Tree


class Alone:
    """This process without others, in the place of `Replicas`."""

    size, rank, split = 1, 0, None

    def __init__(self) -> None:
        self._asked: set[str] = set()

    def mean(self, values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:  # noqa: ARG002
        """The values."""
        return list(values)

    def whole(self, value: Tensor) -> Tensor:
        """It, detached."""
        return value.detach()

    def asks(self, name: str) -> bool:
        """Whether something is to be looked at now: once."""
        first = name not in self._asked
        self._asked.add(name)
        return first


@dataclass(frozen=True, eq=False)
class Averaged:
    """An objective as the mean over the processes, and over parts of a batch in turn.

    Attributes:
        origin: the objective, which each process evaluates.
        name: of it.
        among: the processes.
        accumulate: parts of the batch of this process, evaluated one after another.
    """

    origin: Callable[..., Tensor]
    name: str
    among: Replicas | Alone
    accumulate: int = 1

    def __call__(self, params: Tree, control: Tree, batch: Any) -> Tensor:
        """The mean; its graph is cut where processes meet."""
        given, mine = (params, control), own(batch)
        parts = [mine]
        if self.accumulate > 1 and has_samples(mine):
            n = self.accumulate
            parts = [part_of(mine, "a batch", j, n, "micro-batches") for j in range(n)]
        if isinstance(batch, Portion) or len(parts) > 1:
            whole = batch.whole if isinstance(batch, Portion) else batch
            value = partial(self._alone, given)
            check_mean(self.among, self.name, value, (parts, whole), given, self.origin)
        if len(parts) == 1:
            return autodiff.meeting(partial(self._one, mine), self.among, params, control)
        pieces = [partial(self._one, part) for part in parts]
        return autodiff.in_turn(pieces, self.among, params, control)

    def _one(self, batch: Any, params: Tree, control: Tree) -> Tensor:
        """What this process evaluates on a part."""
        value = check_scalar(self.origin(params, control, batch), self.name)
        autodiff.refuse_hidden(value, (params, control), self.name)
        return value

    def _alone(self, given: Tree, batch: Any) -> Tensor:
        """The same without a graph."""
        return self.origin(*tree.map_leaves(shards.whole, given), batch)


def check_mean(
    among: Replicas | Alone,
    name: str,
    value: Callable[[Any], Tensor],
    batch: tuple[Sequence[Any], Any],
    given: Tree,
    *roots: Any,
) -> None:
    """Refuse, once in a session, a function that is no mean over the samples of a batch.

    Args:
        among: the processes.
        name: of the function.
        value: real scalar, of a batch.
        batch: the parts of this process, and all of it.
        given: what else the function is given, for its devices.
        roots: what reaches the modules that it uses.

    Raises:
        ArgumentError: if the mean over the parts is not its value on all of the batch.
    """
    if not among.asks(name):
        return
    parts, whole_batch = batch
    with autodiff.paused(), preserved(devices_of(given)) as before, buffers_kept(*roots):
        each = [check_scalar(value(one), name) for one in parts]
        whole = check_scalar(value(whole_batch), name)
        part = sum(each[1:], each[0]) / len(each)
        drew = part.new_tensor(float(not before.stands()))
    mean, drawn = (float(x) for x in among.mean([part, drew], [part, drew]) if x is not None)
    # What draws at random is compared with nothing.
    size = max(abs(mean), abs(float(whole)))
    if not drawn and abs(mean - float(whole)) > torch.finfo(part.dtype).eps ** 0.5 * size:
        n = among.size * len(parts)
        raise ArgumentError(
            f"{name} is {float(whole):.6g} on the whole batch, but its mean over {n} parts of it "
            f"is {mean:.6g}: to be split it must be a mean over samples, and a sum, or a layer "
            "that normalises by its batch, is none. Divide by the number of samples; or pass "
            "Replicas(split=True), if the mean over the parts is what you want."
        )


def refuse_shards(params: Tree, control: Tree, *, alone: bool) -> None:
    """Refuse tensors in parts where nothing puts them together.

    Args:
        params: may be in parts where there are replicas.
        control: may not.
        alone: whether there are none.

    Raises:
        ArgumentError: naming what to do.
    """
    if shards.any_shard(tree.leaves_of(control)):
        raise ArgumentError(
            "the control must be whole on every process, got a DTensor: pass its full_tensor(); "
            "params may be in parts."
        )
    if alone and shards.any_shard(tree.leaves_of(params)):
        raise ArgumentError(
            "the params are DTensors, of which each process holds a part: pass the solver "
            "replicas=bilevel.Replicas(), which gathers them for each evaluation of an objective, "
            "or their full_tensor()."
        )


def shared(
    among: Replicas | Alone,
    problem: Any,
    settings: dict[str, Any],
    values: dict[str, Tree],
    batches: dict[str, Any],
    accumulate: int = 1,
) -> tuple[Any, dict[str, Any]]:
    """A bilevel problem and its batches as one of several processes sees them.

    Args:
        among: the processes.
        problem: a `BilevelProblem`.
        settings: what must be the same on all, by name.
        values: trees whose bytes must be.
        batches: by name.
        accumulate: parts of a batch that are evaluated one after another.

    Returns:
        The problem whose objectives are means, and what they are given.

    Raises:
        ParallelError: if the processes do not hold the same.
        ArgumentError: if a batch does not divide, or an objective is no mean over its samples.
        UnsupportedError: if the problem has an objective of each step.
    """
    if getattr(problem, "outer_each", None) is not None:
        raise UnsupportedError(
            "outer_each is evaluated on one process and on whole batches: leave replicas and "
            "micro_batches out, or judge the last params alone by outer."
        )
    given = batches
    if isinstance(among, Replicas):
        among.begin({"problem": problem, **settings}, values)
        given = {name: portions(among, batch, f"{name}_batch") for name, batch in batches.items()}
    inner = Averaged(problem.inner, "the inner objective", among, accumulate)
    outer = Averaged(problem.outer, "the outer objective", among, accumulate)
    return replace(problem, inner=inner, outer=outer), given
