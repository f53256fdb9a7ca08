"""The tasks of a weighted problem, or its columns, shared by several processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_kind
from bilevel.errors import ArgumentError
from bilevel.parallel import Replicas
from bilevel.tasks.problem import Evaluation, Losses, Vmapped
from bilevel.tree import Tree


@final
@dataclass(frozen=True)
class OverRanks(Evaluation):
    """Each process evaluates its share: of the columns of a matrix of weights, or of the tasks.

    Rank r of K has the columns r, r + K, ...; of a vector of weights the tasks, whose losses are
    then given as one function a task. The mean over the processes that the solver takes is that of
    K times the share of each, so that it is the sum over all. Batches are whole on every process.

    Attributes:
        replicas: the processes, with `split=False`; the solver gets the same.
        within: how a process evaluates the columns of its share.

    Raises:
        ArgumentError: if a field is not what it should be.

    Example:
        >>> import torch.distributed as dist, bilevel as bl
        >>> store = dist.HashStore()  # torchrun has one of its own
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> replicas = bl.Replicas(split=False)
        >>> def loss(goal):
        ...     return lambda w, batch: (w - goal) ** 2
        >>> problem = bl.weighted_problem(
        ...     [loss(1.0), loss(-1.0)],  # a process evaluates its share of them
        ...     lambda w, batch: (w - 1) ** 2,
        ...     bl.TaskWeights(2),
        ...     evaluate=bl.tasks.OverRanks(replicas),
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.25), 40, replicas=replicas)
        >>> solver.hypergradient(torch.tensor(0.0), torch.zeros(2)).gradient
        tensor([-1.,  1.])
        >>> dist.destroy_process_group()
    """

    replicas: Replicas
    within: Evaluation = field(default_factory=Vmapped)

    def __post_init__(self) -> None:
        check_kind(self.replicas, Replicas, "replicas", "bilevel.Replicas(split=False)")
        check_kind(self.within, Evaluation, "within", "Vmapped() or Looped()")
        if self.replicas.split is not False:
            raise ArgumentError(
                "OverRanks shares tasks or columns, and not batches: pass "
                f"Replicas(split=False), got split={self.replicas.split}."
            )

    def losses(self, losses: Losses, params: Tree, batch: Any, columns: int) -> Tensor:  # noqa: D102
        own = self._share(columns)
        if not own:  # of as many numbers, so that all is zero
            column = tree.map_leaves(lambda x: x[0] if tree.is_variable(x) else x, params)
            return torch.zeros_like(losses(column, batch)).expand(columns, -1)
        part = tree.map_leaves(lambda x: x[own] if tree.is_variable(x) else x, params)
        return self._placed(self.within.losses(losses, part, batch, len(own)), own, columns)

    def each(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:  # noqa: D102
        own = self._share(len(losses))
        if not own:
            return torch.zeros_like(losses[0]()).expand(len(losses))
        return self._placed(torch.stack([losses[i]() for i in own]), own, len(losses))

    def _share(self, n: int) -> list[int]:
        if not self.replicas.at_work:
            raise ArgumentError(
                "a problem whose tasks are shared by processes is a part of itself on each: give "
                "the solver the replicas of OverRanks."
            )
        return [*range(self.replicas.rank, n, self.replicas.size)]

    def _placed(self, share: Tensor, own: list[int], n: int) -> Tensor:
        """K times the share in its places, zeros in others."""
        zeros = share.new_zeros(n, *share.shape[1:])
        places = torch.tensor(own, dtype=torch.long, device=share.device)
        return zeros.index_copy(0, places, share * self.replicas.size)
