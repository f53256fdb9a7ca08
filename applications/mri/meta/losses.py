"""The losses of a network on the tasks of a minibatch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import bilevel as bl
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.training.draws import Batch
from applications.mri.training.examples import PreparedExample
from bilevel.sweeps import is_look


@dataclass(eq=False)
class TaskLosses:
    """The training loss of each task of a minibatch, differentiable twice; it counts.

    Attributes:
        network: the dynamics.
        loss: weights of its terms.
        checkpointing: of the sweeps through its phases.
        evaluations: slices evaluated so far by sweeps, those included that evaluate again.
    """

    network: Network
    loss: Loss = field(default_factory=Loss)
    checkpointing: bl.Checkpointing | None = None
    evaluations: int = 0

    def __call__(self, control: bl.PerStep, batch: Batch) -> Tensor:
        """Mean loss over the slices of each task, shape ``(tasks,)``."""
        return torch.stack([self.of_task(control, task) for task in batch])

    def of_task(self, control: bl.PerStep, examples: Sequence[PreparedExample]) -> Tensor:
        """Mean loss over the slices of one task, real scalar."""
        counts = [len(one.target) for one in examples]
        if not is_look():  # each process makes its own: a run that goes on counts as one
            self.evaluations += sum(counts)
        costs = []
        for one in examples:
            problem, start = one.problem(self.network, self.loss)
            costs.append(bl.total_cost(problem, start, control, checkpointing=self.checkpointing))
        shares = [count / sum(counts) for count in counts]
        return sum(share * cost for share, cost in zip(shares[1:], costs[1:], strict=True)) + (
            shares[0] * costs[0]
        )
