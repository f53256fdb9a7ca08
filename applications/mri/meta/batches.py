"""Minibatches of tasks, functions of the step alone, and the losses of a network on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.network.scan import Scan
from applications.mri.physics.coil_counts import with_coils
from applications.mri.physics.operators import rss
from applications.mri.tasks.tasks import Task
from applications.mri.training.examples import draw_full, moved


@dataclass(frozen=True, eq=False)
class Bucket:
    """Slices of one matrix size, undersampled and ready for the network.

    Attributes:
        scan: of the network.
        target: coil images of the full data, ``(batch, coils, rows, columns)``.
        reference: magnitude images, ``(batch, rows, columns)``.
    """

    scan: Scan
    target: Tensor
    reference: Tensor


Batch = tuple[tuple[Bucket, ...], ...]  # by task; within a task one example a matrix size


@dataclass(frozen=True, eq=False)
class Batches:
    """Draws minibatches of tasks.

    Attributes:
        network: whose coil count the scans get; see `coil_counts`.
        tasks: in the order of the losses.
        role: of the slices.
        size: slices a task.
        crop: image rows of a slice that are kept [pixels], 0: all; only where the mask samples
            whole columns, as in `TrainingSettings`.
        seed: of slices, flips, masks and crops.
        kept: minibatches remembered, since sweeps ask for a step again.
        device: where they are wanted, as torch names it.

    Raises:
        InputError: if `size` is not positive or `crop` negative.
    """

    network: Network
    tasks: Sequence[Task]
    role: str
    size: int = 1
    crop: int = 0
    seed: int = 0
    kept: int = 1
    device: str = "cpu"
    draw: Callable[[int], Batch] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.size < 1 or self.crop < 0:
            raise InputError(
                f"a batch must have at least 1 slice and crops >= 0 rows, got {self.size} and "
                f"{self.crop}."
            )
        object.__setattr__(self, "draw", lru_cache(self.kept)(self._draw))

    def _draw(self, step: int) -> Batch:
        return tuple(self.task_batch(i, step) for i in range(len(self.tasks)))

    def task_batch(self, task: int, step: int) -> tuple[Bucket, ...]:
        """The minibatch of one task.

        Args:
            task: its number.
            step: the step.

        Returns:
            One example a matrix size, in the order in which sizes were drawn.
        """
        part = self.tasks[task].parts[self.role]
        generator = _generator(self.seed, _ROLE_NUMBERS[self.role], task, step)
        chosen = torch.randperm(len(part), generator=generator)[: self.size]
        buckets = bucketed([self._example(task, int(i), generator) for i in chosen])
        return tuple(moved(one, self.device) for one in buckets)

    def _example(self, task: int, index: int, generator: torch.Generator) -> Bucket:
        """One slice, with a mask of its own, perhaps flipped and cropped."""
        spec = self.tasks[task]
        drawn = draw_full(spec.parts[self.role][index], generator, (spec.sampling,), self.crop)
        target, reference = drawn.target, drawn.reference
        level = spec.settings.target_noise if self.role == "train" else 0.0
        if level:  # of a slice it is the same each time
            place = _generator(self.seed, len(_ROLE_NUMBERS), task, index)
            noise = torch.randn(target.shape, dtype=target.dtype, generator=place)
            target = target + level * target.abs().max() * noise
            reference = rss(target)
        scan, matrix = drawn.scan(self.network)
        target = with_coils(matrix, target)[None, :, drawn.rows]
        return Bucket(scan, target, reference[None, drawn.rows])


_ROLE_NUMBERS = {"train": 0, "validation": 1, "test": 2}


def bucketed(examples: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """Examples of one matrix size put together, in the order of first appearance.

    Args:
        examples: of any sizes.

    Returns:
        One a size.
    """
    buckets: dict[torch.Size, list[Bucket]] = {}
    for one in examples:
        buckets.setdefault(one.target.shape[-2:], []).append(one)
    return tuple(_joined(bucket) for bucket in buckets.values())


def _joined(examples: Sequence[Bucket]) -> Bucket:
    if len(examples) == 1:
        return examples[0]
    scans = [vars(one.scan) for one in examples]
    # Options of the architecture are the same for all: a field is None in every scan or in none.
    scan = {
        name: None if scans[0][name] is None else torch.cat([scan[name] for scan in scans])
        for name in scans[0]
    }
    return Bucket(
        replace(examples[0].scan, **scan),
        torch.cat([one.target for one in examples]),
        torch.cat([one.reference for one in examples]),
    )


@dataclass(eq=False)
class TaskLosses:
    """The training loss of each task of a minibatch, differentiable twice; it counts.

    Attributes:
        network: the dynamics.
        loss: weights of its terms.
        checkpointing: of the sweeps through its phases.
        evaluations: slices evaluated so far, those of sweeps included that evaluate again.
    """

    network: Network
    loss: Loss = field(default_factory=Loss)
    checkpointing: bl.Checkpointing | None = None
    evaluations: int = 0

    def __call__(self, control: bl.PerStep, batch: Batch) -> Tensor:
        """Mean loss over the slices of each task, shape ``(tasks,)``."""
        return torch.stack([self.of_task(control, task) for task in batch])

    def of_task(self, control: bl.PerStep, examples: Sequence[Bucket]) -> Tensor:
        """Mean loss over the slices of one task, real scalar."""
        counts = [len(one.target) for one in examples]
        self.evaluations += sum(counts)
        costs = []
        for one in examples:
            problem, start = self.network.training_problem(
                one.scan, one.target, one.reference, self.loss
            )
            costs.append(bl.total_cost(problem, start, control, checkpointing=self.checkpointing))
        shares = [count / sum(counts) for count in counts]
        return sum(share * cost for share, cost in zip(shares[1:], costs[1:], strict=True)) + (
            shares[0] * costs[0]
        )


def _generator(*numbers: int) -> torch.Generator:
    """A generator for a place in a table, independent of those of other places."""
    state = np.random.SeedSequence([*numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
