"""The forward sweep (6a, 6b), and what one of its steps needs in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.dynamics import Dynamics, PerStep, check_control
from bilevel.dynamics.problem import ControlProblem
from bilevel.errors import ArgumentError
from bilevel.sweeps.checkpointing import Budget, Checkpointing, plan
from bilevel.sweeps.live import LiveBytes, bytes_of
from bilevel.sweeps.randomness import RandomState, devices_of, preserved
from bilevel.sweeps.schedule import Action, Do
from bilevel.sweeps.storage import InMemory
from bilevel.sweeps.trajectory import Trajectory, watch
from bilevel.tree import Tree


def forward_sweep(
    dynamics: Dynamics,
    observation: Tree,
    control: Tree,
    horizon: int,
    checkpointing: Checkpointing,
    *,
    tape_last: bool,
) -> Trajectory:
    """u(0) = g0(f; theta_0) and u(t) = g(u(t-1), theta_t), t = 1..T.

    Args:
        dynamics: g and g0.
        observation: f.
        control: Theta.
        horizon: number of steps, T.
        checkpointing: which states or graphs are kept.
        tape_last: tape the last block at once, because it will be reversed before anything else
            is taped; it then is not evaluated twice.

    Returns:
        The trajectory; to be closed by who asked for it.

    Raises:
        StructureError: if the control does not fit the horizon, or a step changes the structure.
        LostGradientError: if the dynamics closes over a tensor that requires grad.
        ArgumentError: if the dynamics writes to its arguments.
    """
    sweep = _trajectory(dynamics, observation, control, horizon, checkpointing)
    constants = tree.detach((observation, control))
    written = watch((constants, sweep.observation, sweep.control))
    try:
        with autodiff.recording():
            _sweep_forward(sweep, constants, tape_last=tape_last)
    except BaseException:
        sweep.close()
        raise
    if written():
        sweep.close()
        raise ArgumentError(
            "the dynamics writes to its observation or its control in place: clone them first."
        )
    return sweep


def _trajectory(
    dynamics: Dynamics,
    observation: Tree,
    control: Tree,
    horizon: int,
    checkpointing: Checkpointing,
) -> Trajectory:
    check_control(control, horizon)
    tree.check_leaves(observation, "observation")
    return Trajectory(
        dynamics,
        horizon,
        checkpointing,
        autodiff.variables(observation),
        autodiff.variables(control),
        devices_of((observation, control)),
        (checkpointing.storage or InMemory()).open(),
    )


def _sweep_forward(sweep: Trajectory, constants: tuple[Tree, Tree], *, tape_last: bool) -> None:
    graphs = sweep.checkpointing.keeps_graphs
    if graphs:
        sweep.initial_tape = state = sweep.begin(sweep.observation, sweep.control)
        autodiff.refuse_hidden(state, (sweep.observation, sweep.control), "dynamics.init")
        state = tree.detach(state)
    else:
        sweep.random_start = RandomState.capture(sweep.devices)
        state = sweep.begin(*constants)
        autodiff.refuse_hidden(state, (), "dynamics.init")
    sweep.devices |= devices_of(state)
    schedule = sweep.schedule
    if not schedule.n_blocks:
        sweep.final = state
    sweep.state = state
    del state
    for action in schedule.actions():
        if action.do is not Do.TAPE:
            if not graphs:
                sweep.follow(action, constants[1])
            continue
        steps = schedule.steps(action.block)
        state, sweep.state = sweep.state, None
        if graphs or tape_last:
            sweep.last_tape = block = sweep.tape(steps, state, first=True)
            sweep.final = tree.detach(block.states[-1])
        else:
            allowed = sweep.checkpointing.snapshots or schedule.n_blocks
            if action.block not in sweep.random and len(sweep.random) < allowed:
                sweep.state = state
                sweep.follow(Action(Do.KEEP, action.block), constants[1])
                sweep.state = None
            sweep.final = sweep.advance(steps, state, constants[1])
        return


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
        >>> found = bl.measure(problem, torch.ones(1000), torch.tensor(0.5))
        >>> found.state_bytes, found.graph_bytes
        (4000, 4000)
    """
    dynamics = plain(problem.dynamics)  # torch compiles nothing where storages are counted
    sweep = _trajectory(dynamics, observation, control, problem.horizon, Checkpointing(block=None))
    with autodiff.recording(), preserved(sweep.devices):
        start = tree.detach(sweep.begin(*tree.detach((observation, control))))
        sweep.devices |= devices_of(start)
        with preserved(sweep.devices):
            found = [_measure_step(sweep, problem, start, t) for t in _distinct(sweep)]
            with LiveBytes() as live:
                terminal = autodiff.value_and_gradient(
                    lambda u, theta: problem.terminal(problem.dynamics.readout(u), theta),
                    start,
                    control,
                    name="the terminal cost",
                )
            del terminal
    states, graphs, working = zip(*found, (bytes_of(start), 0, 0), strict=True)
    # Beside a pull live the final state, the multiplier, the state the block led to, and random
    # states: of the caller, before g0, and two while one is compared with the last.
    random = 4 * torch.get_rng_state().nbytes
    working = 3 * max(states) + max(live.peak, *working) + random
    return Measurement(max(states), max(graphs), working)


def _measure_step(
    sweep: Trajectory, problem: ControlProblem, start: Tree, t: int
) -> tuple[int, int, int]:
    random = RandomState.capture(sweep.devices)
    with LiveBytes() as live:
        block = sweep.tape(range(t - 1, t), start)
        costs = []
        if problem.running is not None:
            costs.append(
                problem.running(problem.dynamics.readout(block.states[0]), block.controls[0], t)
            )
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
    if isinstance(sweep.control, PerStep):  # a block's gradients, before they are gathered
        own = bytes_of(sweep.control.steps[t - 1])
        return state, graph + own, live.peak - graph + whole - own
    return state, graph, live.peak - graph + whole


def _distinct(sweep: Trajectory) -> list[int]:
    horizon = sweep.horizon
    if horizon <= 16:
        return [*range(1, horizon + 1)]
    found = {}
    if isinstance(sweep.control, PerStep):
        for t, part in enumerate(sweep.control.steps, 1):
            leaves, structure = tree.flatten(part)
            shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves)
            found.setdefault((structure, shapes), t)
    return sorted({1, horizon, *found.values()})


def planned(
    checkpointing: Checkpointing | Budget | None,
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    *,
    graphs: int = 1,
) -> Checkpointing:
    """The checkpointing that was asked for, or the one that a budget allows.

    Args:
        checkpointing: as the user gave it.
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        graphs: how many times its graph a taped step takes.

    Returns:
        A checkpointing.

    Raises:
        ArgumentError: if it is neither, or the budget is too small.
    """
    if checkpointing is None:
        return Checkpointing()
    if isinstance(checkpointing, Checkpointing):
        return checkpointing
    if not isinstance(checkpointing, Budget):
        raise ArgumentError(
            "checkpointing must be a Checkpointing, a Budget or None, got "
            f"{type(checkpointing).__name__}."
        )
    found = measure(problem, observation, control)
    return plan(
        problem.horizon,
        checkpointing.bytes,
        found.state_bytes,
        graphs * found.graph_bytes,
        checkpointing.storage,
        working_bytes=found.working_bytes,
    )
