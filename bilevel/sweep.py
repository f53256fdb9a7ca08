"""Executes a schedule: the forward sweep (6a, 6b), and its blocks of steps taped in reverse.

Nothing here knows costs or multipliers; `lagrangian` does. A *taped* step runs on variable trees,
so that its graph can be pulled back; the graph of one block lives at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.checkpointing import Checkpointing
from bilevel.dynamics import Dynamics, check_control, initial_control, step_control
from bilevel.errors import ArgumentError, LostGradientError
from bilevel.randomness import RandomState
from bilevel.tree import Tree


@dataclass(frozen=True)
class Block:
    """Steps a+1..b, taped as one connected graph.

    Attributes:
        steps: `range(a, b)`.
        states: u(a), ..., u(b); u(a) is a variable tree, the others were computed from it, and
            u(b) is as the step returned it.
        controls: theta_{a+1}, ..., theta_b, parts of the variable tree of the control.
    """

    steps: range
    states: list[Tree]
    controls: list[Tree]


@dataclass
class Trajectory:
    """What the forward sweep leaves behind, enough to tape every block again.

    Attributes:
        dynamics: g and g0.
        horizon: number of steps, T.
        checkpointing: what is kept.
        observation: f, a variable tree.
        control: Theta, a variable tree.
        starts: u at the start of each block, detached.
        final: u(T), detached.
        random_starts: random state before g0 and before each block; none where graphs are kept.
        forward_steps: steps evaluated so far, taped or not.
        initial_tape: u(0) with the graph of g0, where graphs are kept.
        last_tape: the last block, where it was taped on the way forward.
    """

    dynamics: Dynamics
    horizon: int
    checkpointing: Checkpointing
    observation: Tree
    control: Tree
    starts: list[Tree] = field(default_factory=list)
    final: Tree = None
    random_starts: list[RandomState] = field(default_factory=list)
    forward_steps: int = 0
    initial_tape: Tree = None
    last_tape: Block | None = None

    @property
    def devices(self) -> set[torch.device]:
        """Devices whose random generators a step may use."""
        leaves = tree.leaves_of((self.observation, self.control, self.final))
        return {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}

    @property
    def blocks(self) -> Sequence[range]:
        """Steps of each block, in time order."""
        return self.checkpointing.blocks(self.horizon)

    def taped_in_reverse(self) -> Iterator[Block]:
        """The blocks, last first, each taped when it is asked for. A kept tape serves once.

        Yields:
            The taped blocks.

        Raises:
            ArgumentError: if a step, evaluated again, gives another state.
        """
        following, checked = self.final, False
        for i, steps in reversed(list(enumerate(self.blocks))):
            block, self.last_tape = self.last_tape, None
            if block is None:
                self.random_starts[i + 1].restore()
                block = self._tape(steps, self.starts[i])
                if not checked:
                    name = f"steps {steps.start + 1} to {steps.stop} of the dynamics"
                    _check_deterministic(block.states[-1], following, name)
                    checked = True
            following = self.starts[i]
            yield block

    def taped_initial(self) -> Tree:
        """u(0) with the graph of g0 in the observation and the control. A kept tape serves once.

        Returns:
            The initial state.

        Raises:
            ArgumentError: if g0, evaluated again, gives another state.
        """
        tape, self.initial_tape = self.initial_tape, None
        if tape is None:
            self.random_starts[0].restore()
            tape = self._init(self.observation, self.control)
            expected = self.starts[0] if self.starts else self.final
            _check_deterministic(tape, expected, "dynamics.init")
        return tape

    def _init(self, observation: Tree, control: Tree) -> Tree:
        state = self.dynamics.init(observation, initial_control(control))
        tree.check_leaves(state, "u(0)")
        return state

    def _step(self, state: Tree, control: Tree, t: int) -> Tree:
        versions = _versions(state)
        following = self.dynamics.step(state, step_control(control, t), t)
        tree.check_like(following, state, f"u({t})", f"step {t} must return a state like its own")
        if _versions(state) != versions:
            raise ArgumentError(
                f"step {t} writes to its state in place, but the sweep still needs that state: "
                "let the step return new tensors, or begin it with state.clone()."
            )
        self.forward_steps += 1
        return following

    def _tape(self, steps: range, start: Tree) -> Block:
        states = [autodiff.variables(start)]
        times = range(steps.start + 1, steps.stop + 1)
        for t in times:
            following = self._step(states[-1], self.control, t)
            states.append(following if t == steps.stop else autodiff.told_apart(following))
        return Block(steps, states, [step_control(self.control, t) for t in times])

    def _advance(self, steps: range, start: Tree, control: Tree) -> Tree:
        state = start
        for t in range(steps.start + 1, steps.stop + 1):
            state = self._step(state, control, t)
            # Nothing here requires grad, unless the step closed over something that does.
            autodiff.refuse_hidden(state, (), f"step {t} of the dynamics")
        return state


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
        The trajectory.

    Raises:
        StructureError: if the control does not fit the horizon, or a step changes the structure.
        LostGradientError: if the dynamics closes over a tensor that requires grad.
        ArgumentError: if the dynamics writes to its arguments.
    """
    check_control(control, horizon)
    tree.check_leaves(observation, "observation")
    sweep = Trajectory(
        dynamics,
        horizon,
        checkpointing,
        autodiff.variables(observation),
        autodiff.variables(control),
    )
    constants = tree.detach((observation, control))
    versions = _versions(constants)
    with autodiff.recording():
        if checkpointing.keeps_graphs:
            sweep.initial_tape = state = sweep._init(sweep.observation, sweep.control)
            autodiff.refuse_hidden(state, (sweep.observation, sweep.control), "dynamics.init")
            state = tree.detach(state)
        else:
            sweep.random_starts.append(RandomState.capture(sweep.devices))
            state = sweep._init(*constants)
            autodiff.refuse_hidden(state, (), "dynamics.init")
        for steps in sweep.blocks:
            sweep.starts.append(state)
            if not checkpointing.keeps_graphs:
                previous = sweep.random_starts[-1]
                sweep.random_starts.append(RandomState.capture(sweep.devices, previous))
            if checkpointing.keeps_graphs or (tape_last and steps.stop == horizon):
                sweep.last_tape = block = sweep._tape(steps, state)
                inputs = (block.states[:-1], sweep.control)
                autodiff.refuse_hidden(block.states[-1], inputs, f"step {horizon} of the dynamics")
                state = tree.detach(block.states[-1])
            else:
                state = sweep._advance(steps, state, constants[1])
    sweep.final = state
    if _versions(constants) != versions:
        raise ArgumentError(
            "the dynamics writes to its observation or its control in place: clone them first."
        )
    return sweep


class GradientSum:
    """A gradient in a control, gathered from the parts of the control that steps receive."""

    def __init__(self, control: Tree) -> None:
        """Start from nothing; `control` is the variable tree whose parts will be named."""
        self._leaves, self._structure = tree.flatten(control)
        self._names = tree.leaf_names(control, "control")
        self._index = {id(leaf): i for i, leaf in enumerate(self._leaves)}
        self._sums: list[Tensor | None] = [None] * len(self._leaves)

    def add(self, part: Tree, vector: Tree) -> None:
        """Add `vector`, None where nothing is to be added, in the places of `part`."""
        for leaf, term in zip(tree.leaves_of(part), tree.leaves_of(vector), strict=True):
            if term is not None:
                i = self._index[id(leaf)]
                total = self._sums[i]
                self._sums[i] = term if total is None else total + term

    def subtract(self, part: Tree, vector: Tree) -> None:
        """Subtract `vector` in the places of `part`."""
        self.add(part, tree.negative(vector))

    def sums(self) -> Tree:
        """What was gathered, None where nothing was."""
        return tree.unflatten(self._structure, self._sums)

    def total(self) -> Tree:
        """The gradient of the whole problem.

        Returns:
            A vector of the space of the control.

        Raises:
            LostGradientError: if nothing read some part of the control.
        """
        for leaf, total, name in zip(self._leaves, self._sums, self._names, strict=True):
            if tree.is_variable(leaf) and total is None:
                raise LostGradientError(
                    f"{name} reaches no cost, neither directly nor through the dynamics, so that "
                    "its gradient would be a silent zero: use it, or leave it out of the control."
                )
        return self.sums()


def _versions(values: Tree) -> list[int]:
    return [leaf._version for leaf in tree.leaves_of(values) if isinstance(leaf, Tensor)]


def _check_deterministic(again: Tree, expected: Tree, name: str) -> None:
    """Refuse a state that is not what the forward sweep found; half of the digits count."""
    # Some kernels are deterministic only to rounding, so equality to the last bit is too much.
    for new, old in zip(tree.leaves_of(again), tree.leaves_of(expected), strict=True):
        if not tree.is_variable(old):
            continue
        tolerance = torch.finfo(old.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(old))
        if float(torch.linalg.vector_norm(new.detach() - old)) > tolerance:
            raise ArgumentError(
                f"{name} gave another state when evaluated again, although torch's default "
                "generators were restored: pass what is random in with the observation, or a field "
                "of the dynamics, or keep the graphs with Checkpointing(block=None)."
            )
