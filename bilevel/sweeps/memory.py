"""What one step of a problem needs in memory, and the checkpointings that a budget allows."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import autodiff, tree
from bilevel.checks import check_kind
from bilevel.dynamics.closures import buffers_kept
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.per_step import GradientSum, PerStep
from bilevel.dynamics.problem import ControlProblem
from bilevel.dynamics.steps import Step, begun
from bilevel.sweeps.block import Block
from bilevel.sweeps.checkpointing import Budget, Checkpointing, plan
from bilevel.sweeps.randomness import RandomState, devices_of, looking, preserved
from bilevel.sweeps.trajectory import Trajectory
from bilevel.tree import Tree


class LiveBytes(TorchDispatchMode):
    """Inside this context, what was made inside it and is still alive.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once.

    Example:
        >>> with LiveBytes() as live:
        ...     kept = torch.zeros(1000).exp().sum()
        >>> live.now, live.peak
        (4, 8000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and note the storages that it made."""
        found = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for key, storage in storages(found).items():
            if key not in given:
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size).atexit = False
        return found

    def _free(self, size: int) -> None:
        self.now -= size


def storages(values: Tree) -> dict[int, Any]:
    """The storages of the tensors of a tree, each once."""
    tensors = [y for x in tree.leaves_of(values) if isinstance(x, Tensor) for y in _parts(x)]
    return {s._cdata: s for s in (x.untyped_storage() for x in tensors)}


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """What holds the numbers of a tensor: itself, of a sparse one its indices and values."""
    match x.layout:
        case torch.sparse_coo:
            return x._indices(), x._values()
        case torch.sparse_csr | torch.sparse_bsr:
            return x.crow_indices(), x.col_indices(), x.values()
        case torch.sparse_csc | torch.sparse_bsc:
            return x.ccol_indices(), x.row_indices(), x.values()
    return (x,)


def bytes_of(values: Tree) -> int:
    """Bytes of the storages of a tree; views of one storage count once."""
    return sum(storage.nbytes() for storage in storages(values).values())


@dataclass(frozen=True)
class Measurement:
    """What one step of a problem needs; the largest over its distinct steps.

    Attributes:
        state_bytes: of a state, and of the random state where steps draw.
        graph_bytes: alive after taping a step, and its own control's gradient.
        working_bytes: alive at once beyond that while a step is pulled back: the final state,
            the multiplier, and what passes through.

    Example:
        >>> import torch, bilevel as bl
        >>> step = bl.Map(lambda state, control, t: torch.tanh(control * state))
        >>> problem = bl.ControlProblem(
        ...     step, lambda state, control: state.sum(), horizon=100
        ... )
        >>> found = bl.sweeps.measure(problem, torch.ones(1000), torch.tensor(0.5))
        >>> found.state_bytes  # 1000 numbers of 4 bytes
        4000
    """

    state_bytes: int
    graph_bytes: int
    working_bytes: int


@dataclass(frozen=True, eq=False)
class Rehearsed:
    """What a sweep that differs from `adjoint` does.

    Attributes:
        step: what it tapes.
        reverse: of the trajectory and a block; gives what belongs to the result.
        end: differentiates the terminal cost, of a final state and the control.
        grows: whether reversing a block makes something for each step that stays until its end.
    """

    step: Step
    reverse: Callable[[Trajectory, Block], Tree]
    end: Callable[[Tree, Tree], Any]
    grows: bool = True


def measure(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    sweep: Rehearsed | None = None,
) -> Measurement:
    """Bytes that one step needs, found by taping and reversing one step and two in a row.

    Storages of tensors are counted as they come and go. All steps of a short horizon are measured;
    of a long one the first, the last, and one for each structure, shape and dtype of the control.
    All start from u(1). What a kernel allocates for itself within a call is not seen; of a
    `Compiled` dynamics the plain step is measured.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        sweep: which one will run; None is that of `adjoint`.

    Returns:
        The bytes.

    Example:
        >>> import bilevel as bl
        >>> step = bl.Map(lambda state, control, t: torch.tanh(control * state))
        >>> problem = bl.ControlProblem(
        ...     step, lambda state, control: state.sum(), horizon=100
        ... )
        >>> found = bl.sweeps.measure(problem, torch.ones(1000), torch.tensor(0.5))
        >>> found.state_bytes, found.graph_bytes
        (4000, 4000)
    """
    sweep = sweep or _adjoint(problem)
    dynamics = plain(problem.dynamics)  # torch compiles nothing where storages are counted
    graphs = Checkpointing(block=None)
    trajectory = Trajectory(
        dynamics, observation, control, problem.horizon, graphs, problem.step_costs
    )
    with (
        looking(),
        autodiff.recording(),
        preserved(trajectory.devices),
        buffers_kept(dynamics, problem.running, problem.terminal),
    ):
        with LiveBytes() as live:
            taped = begun(dynamics, trajectory.observation, trajectory.control)
            ones = tree.map_leaves(_ones, taped)
            autodiff.pull(taped, ones, (trajectory.observation, trajectory.control))
        least, start = live.peak, tree.detach(taped)
        del taped
        state = bytes_of(start)
        with preserved(trajectory.devices | devices_of(start)):
            if problem.horizon > 1:
                # What is one tensor at first, as the moments of Adam are, is several from then on.
                start = trajectory.advance(range(1), start)
                state = max(state, bytes_of(start))
            rehearsal = _Rehearsal(trajectory, start, sweep)
            found = [rehearsal.of(t) for t in _distinct(problem.horizon, control)]
            with LiveBytes() as live:
                ended = sweep.end(start, control)
            del ended
    # Beside what was measured lives the final state, and random states: of the caller, before g0,
    # and two while one is compared with the last.
    drawn = max((size for size, _, _ in found), default=0)
    random = 4 * torch.get_rng_state().nbytes
    working = max([least, 2 * state + live.peak, *(size for _, _, size in found)]) + random
    return Measurement(state + drawn, max((size for _, size, _ in found), default=0), working)


def _ones(leaf: Any) -> Tensor | None:
    return torch.ones_like(leaf) if tree.is_variable(leaf) else None


def _adjoint(problem: ControlProblem) -> Rehearsed:
    def end(state: Tree, control: Tree) -> Any:
        name = "the terminal cost"
        return autodiff.value_and_gradient(problem.final_cost, state, control, name=name)

    return Rehearsed(plain(problem.dynamics).step, _reverse, end, grows=False)


def _reverse(trajectory: Trajectory, block: Block) -> Tree:
    """As a multiplier sweep does it, when the gradient of what is shared is there already."""
    gradient = begun_sum(trajectory.control)
    outputs, thetas = (block.states[-1], block.costs), tree.distinct_leaves(block.controls)
    ones = tree.map_leaves(_ones, outputs)
    pulled = autodiff.pull(outputs, ones, (block.states[0], thetas))
    gradient.subtract(thetas, pulled[1])
    return gradient.sums()


def begun_sum(control: Tree) -> GradientSum:
    """A gradient that has terms already in what all steps share."""
    gradient = GradientSum(control)
    gradient.add(_shared(control), tree.zeros_like(_shared(control)))
    return gradient


@dataclass(frozen=True, eq=False)
class _Rehearsal:
    """Steps taped from one state and reversed, as a sweep does it."""

    trajectory: Trajectory
    start: Tree
    sweep: Rehearsed

    def of(self, t: int) -> tuple[int, int, int]:
        """Bytes drawn by step t, of its graph, and of what works beside graphs meanwhile."""
        random = RandomState.capture(self.trajectory.devices)
        rest, one = self._peak(range(t - 1, t))
        drawn = 0 if random.stands() else random.cpu.nbytes
        with LiveBytes() as live:
            self.trajectory.advance(range(t - 1, t), self.start)
        # Without a graph beside it, but with the state that it came from.
        works = max(one - rest, live.peak + bytes_of(self.start))
        if t not in (1, self.trajectory.horizon) or self.trajectory.horizon < 2:
            return drawn, rest, works
        first = min(t, self.trajectory.horizon - 1) - 1
        _, two = self._peak(range(first, first + 2))
        # Only the second step adds to a gradient of what is shared; from then on they are alike.
        slope = two - one - bytes_of(_shared(self.trajectory.control))
        graph = max(rest, slope) if self.sweep.grows else rest
        return drawn, graph, max(works, two - 2 * graph)

    def _peak(self, steps: range) -> tuple[int, int]:
        """What the graph of steps needs before it is reversed, and the most alive meanwhile."""
        with LiveBytes() as live:
            block = self.trajectory.tape(steps, self.start, step=self.sweep.step)
            rest = live.now
            result = self.sweep.reverse(self.trajectory, block)
        control, own = self.trajectory.control, 0
        if isinstance(control, PerStep):  # a block's gradients, before they are gathered
            own = sum(bytes_of(control.steps[t]) for t in steps)
        # Beside it: the final state, the one that the block led to, the multiplier.
        beside = 3 * bytes_of(self.start)
        return rest + own, live.peak - bytes_of(result) + own + beside


def _shared(control: Tree) -> Tree:
    """What all steps receive of a control."""
    return control.shared if isinstance(control, PerStep) else control


def _distinct(horizon: int, control: Tree) -> list[int]:
    """Steps that may differ in what they need."""
    if horizon <= 16:
        return [*range(1, horizon + 1)]
    kinds: dict[Any, int] = {}
    if isinstance(control, PerStep):
        for t, part in enumerate(control.steps, 1):
            kinds.setdefault(_kind(part), t)
    return sorted({1, horizon, *kinds.values()})


def _kind(values: Tree) -> Any:
    """What trees of the same structure, shapes, dtypes and devices have in common."""
    leaves, structure = tree.flatten(values)
    return structure, tuple(
        (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in leaves
    )


def planned(
    checkpointing: Checkpointing | Budget | None,
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    sweep: Rehearsed | None = None,
    longest: int | None = None,
) -> Checkpointing:
    """The checkpointing that was asked for, or the one that a budget allows in such blocks."""
    if checkpointing is None:
        return Checkpointing()
    if isinstance(checkpointing, Checkpointing):
        return checkpointing
    check_kind(checkpointing, Budget, "checkpointing", "a Checkpointing, a Budget or None")
    found = measure(problem, observation, control, sweep)
    size, storage = checkpointing.bytes, checkpointing.storage
    sizes = problem.horizon, size, found.state_bytes, found.graph_bytes
    bounded = storage.bounded(devices_of((observation, control)))
    chosen = plan(*sizes, bounded, working_bytes=found.working_bytes, longest=longest)
    return chosen if chosen.keeps_graphs else replace(chosen, storage=storage)


class Plans:
    """What was asked for, planned once for each kind of problem.

    Measuring a step costs about a sweep. Problems whose horizon, observation and control agree in
    structure, shape, dtype and device are of one kind.
    """

    def __init__(
        self, checkpointing: Checkpointing | Budget | None, longest: int | None = None
    ) -> None:
        self._given, self._longest = checkpointing, longest
        self._found: dict[Any, Checkpointing] = {}

    def of(self, problem: ControlProblem, observation: Tree, control: Tree) -> Checkpointing:
        """The checkpointing of a problem."""
        kind = problem.horizon, _kind((observation, control))
        if kind not in self._found:
            given = problem, observation, control
            self._found[kind] = planned(self._given, *given, longest=self._longest)
        return self._found[kind]
