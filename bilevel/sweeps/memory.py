"""What one step of a problem needs in memory, and the checkpointings that a budget allows."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import autodiff, tree
from bilevel.checks import check_kind
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.per_step import PerStep
from bilevel.dynamics.problem import ControlProblem
from bilevel.dynamics.steps import begun
from bilevel.sweeps.checkpointing import Budget, Checkpointing, plan
from bilevel.sweeps.randomness import RandomState, devices_of, preserved
from bilevel.sweeps.trajectory import Trajectory
from bilevel.tree import Tree


class LiveBytes(TorchDispatchMode):
    """Inside this context, what was made inside it and is still alive.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once.
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
    tensors = (x for x in tree.leaves_of(values) if isinstance(x, Tensor))
    return {s._cdata: s for s in (x.untyped_storage() for x in tensors)}


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
    """

    state_bytes: int
    graph_bytes: int
    working_bytes: int


def measure(problem: ControlProblem, observation: Tree, control: Tree) -> Measurement:
    """Bytes that one step needs, found by taping it and pulling it back once.

    Storages of tensors are counted as they come and go. All steps of a short horizon are measured;
    of a long one the first, the last, and one for each structure, shape and dtype of the control.
    All start from u(0). What a kernel allocates for itself within a call is not seen; of a
    `Compiled` dynamics the plain step is measured.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.

    Returns:
        The bytes.

    Example:
        >>> import bilevel as bl
        >>> step = bl.Map(lambda state, control, t: torch.tanh(control * state))
        >>> problem = bl.ControlProblem(step, lambda state, control: state.sum(), horizon=100)
        >>> found = bl.sweeps.measure(problem, torch.ones(1000), torch.tensor(0.5))
        >>> found.state_bytes, found.graph_bytes
        (4000, 4000)
    """
    dynamics = plain(problem.dynamics)  # torch compiles nothing where storages are counted
    graphs = Checkpointing(block=None)
    trajectory = Trajectory(dynamics, observation, control, problem.horizon, graphs)
    with autodiff.recording(), preserved(trajectory.devices):
        start = tree.detach(begun(dynamics, *tree.detach((observation, control))))
        devices = trajectory.devices | devices_of(start)
        with preserved(devices):
            found = [
                _measure_step(trajectory, problem, start, t, RandomState.capture(devices))
                for t in _distinct(problem.horizon, control)
            ]
            with LiveBytes() as live:
                terminal = autodiff.value_and_gradient(
                    problem.final_cost, start, control, name="the terminal cost"
                )
            del terminal
    states, graphs, working = zip(*found, (bytes_of(start), 0, 0), strict=True)
    # Beside a pull live the final state, the multiplier, the state the block led to, and random
    # states: of the caller, before g0, and two while one is compared with the last.
    random = 4 * torch.get_rng_state().nbytes
    working = 3 * max(states) + max(live.peak, *working) + random
    return Measurement(max(states), max(graphs), working)


def _measure_step(
    trajectory: Trajectory, problem: ControlProblem, start: Tree, t: int, random: RandomState
) -> tuple[int, int, int]:
    """Bytes of a state, of the graph of step t, and what is alive beyond while it is pulled."""
    with LiveBytes() as live:
        block = trajectory.tape(range(t - 1, t), start)
        costs = problem.step_costs(block.states[0], block.controls[0], t)
        graph = live.now
        ones = tree.map_leaves(
            lambda x: torch.ones_like(x) if tree.is_variable(x) else None, (block.states[-1], costs)
        )
        inputs = block.states[0], tree.distinct_leaves(block.controls)
        pulled = autodiff.pull((block.states[-1], costs), ones, inputs)
        del pulled
    state = bytes_of(block.states[-1])
    if not random.stands():
        state += random.cpu.nbytes
    whole = bytes_of(block.controls[0])
    if isinstance(trajectory.control, PerStep):  # a block's gradients, before they are gathered
        own = bytes_of(trajectory.control.steps[t - 1])
        return state, graph + own, live.peak - graph + whole - own
    return state, graph, live.peak - graph + whole


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
    *,
    graphs: int = 1,
) -> Checkpointing:
    """The checkpointing that was asked for, or the one that a budget allows."""
    if checkpointing is None:
        return Checkpointing()
    if isinstance(checkpointing, Checkpointing):
        return checkpointing
    check_kind(checkpointing, Budget, "checkpointing", "a Checkpointing, a Budget or None")
    found = measure(problem, observation, control)
    return plan(
        problem.horizon,
        checkpointing.bytes,
        found.state_bytes,
        graphs * found.graph_bytes,
        checkpointing.storage,
        working_bytes=found.working_bytes,
    )


class Plans:
    """What was asked for, planned once for each kind of problem.

    Measuring a step costs about a sweep. Problems whose horizon, observation and control agree in
    structure, shape, dtype and device are of one kind.
    """

    def __init__(self, checkpointing: Checkpointing | Budget | None) -> None:
        self._given = checkpointing
        self._found: dict[Any, Checkpointing] = {}

    def of(self, problem: ControlProblem, observation: Tree, control: Tree) -> Checkpointing:
        """The checkpointing of a problem."""
        kind = problem.horizon, _kind((observation, control))
        if kind not in self._found:
            self._found[kind] = planned(self._given, problem, observation, control)
        return self._found[kind]
