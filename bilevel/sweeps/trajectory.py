"""A swept trajectory: executes a schedule, block by block, last block first.

Nothing here knows costs or multipliers; `lagrangian` does. A *taped* step runs on variable trees,
so that its graph can be pulled back; the graph of one block lives at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import dropwhile, pairwise
from operator import is_

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.dynamics import Dynamics, initial_control, step_control
from bilevel.errors import ArgumentError, LostGradientError
from bilevel.sweeps.checkpointing import Checkpointing, Snapshots
from bilevel.sweeps.randomness import RandomState
from bilevel.sweeps.schedule import Action, Do, Schedule
from bilevel.sweeps.storage import MemorySnapshots
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
    """What the forward sweep leaves behind, enough to tape every block again, once.

    Attributes:
        dynamics: g and g0.
        horizon: number of steps, T.
        checkpointing: what is kept.
        observation: f, a variable tree.
        control: Theta, a variable tree.
        devices: those whose random generators a step may use.
        snapshots: states at starts of blocks.
        random: random state at each snapshot; None where graphs are kept.
        random_start: random state before g0; None where graphs are kept.
        final: u(T), detached.
        forward_steps: steps evaluated so far, taped or not.
        initial_tape: u(0) with the graph of g0, where graphs are kept.
        last_tape: the last block, where it was taped on the way forward.
        state: the current state, None between blocks.
        compared: what of a state must be the same when it is evaluated again; all of it.
    """

    dynamics: Dynamics
    horizon: int
    checkpointing: Checkpointing
    observation: Tree
    control: Tree
    devices: frozenset[torch.device]
    snapshots: Snapshots = field(default_factory=MemorySnapshots)
    random: dict[int, RandomState] = field(default_factory=dict)
    random_start: RandomState | None = None
    final: Tree = None
    forward_steps: int = 0
    initial_tape: Tree = None
    last_tape: Block | None = None
    state: Tree = None
    compared: Callable[[Tree], Tree] = lambda state: state
    _at: int = 0
    _following: Tree = None  # what the block to be taped next must lead to

    @cached_property
    def schedule(self) -> Schedule:
        """When blocks are kept, advanced and taped."""
        return self.checkpointing.schedule(self.horizon)

    def close(self) -> None:
        """Forget every snapshot, and leave no file behind."""
        self.snapshots.close()
        self.random.clear()
        self.state = self._following = self.last_tape = self.initial_tape = None

    def taped_in_reverse(self) -> Iterator[Block]:
        """The blocks, last first, each taped when it is asked for; serves once.

        Yields:
            The taped blocks.

        Raises:
            ArgumentError: if a step, evaluated again, gives another state.
        """
        schedule, control = self.schedule, tree.detach(self.control)
        self._following = self.final
        actions = dropwhile(lambda action: action.do is not Do.TAPE, schedule.actions())
        for action in actions:
            if action.do is not Do.TAPE:
                if not self.checkpointing.keeps_graphs:
                    self.follow(action, control)
                continue
            block, self.last_tape = self.last_tape, None
            steps = schedule.steps(action.block)
            if block is None:
                if self.state is None:  # as the forward sweep of a rollout leaves it
                    self._reach(action.block, control)
                block = self.tape(steps, self.state)
                name = f"steps {steps.start + 1} to {steps.stop} of the dynamics"
                self._check_same(block.states[-1], self._following, name)
            self.state = None
            self._following = tree.detach(block.states[0])
            yield block
            del block  # before the next is taped

    def taped_initial(self) -> Tree:
        """u(0) with the graph of g0 in the observation and the control; after the blocks, once.

        Returns:
            The initial state.

        Raises:
            ArgumentError: if g0, evaluated again, gives another state.
        """
        tape, self.initial_tape = self.initial_tape, None
        if tape is None:
            if self.random_start is not None:
                self.random_start.restore()
            tape = self.begin(self.observation, self.control)
            expected = self._following if self.horizon else self.final
            self._check_same(tape, expected, "dynamics.init")
        return tape

    def _check_same(self, again: Tree, expected: Tree, name: str) -> None:
        _check_deterministic(self.compared(again), self.compared(expected), name)

    def begin(self, observation: Tree, control: Tree) -> Tree:
        """u(0)."""
        state = self.dynamics.init(observation, initial_control(control))
        tree.check_leaves(state, "u(0)")
        return state

    def _step(self, state: Tree, control: Tree, t: int) -> Tree:
        written = watch(state)
        following = self.dynamics.step(state, step_control(control, t), t)
        if not tree.alike(following, state):
            source = f"step {t} must return a state like its own"
            tree.check_like(following, state, f"u({t})", source)
        if written():
            raise ArgumentError(
                f"step {t} writes to its state in place, but the sweep still needs that state: "
                "let the step return new tensors, or begin it with state.clone()."
            )
        self.forward_steps += 1
        return following

    def tape(self, steps: range, start: Tree, *, first: bool = False) -> Block:
        """Steps taped from the state at their start.

        Args:
            steps: of one block.
            start: the state.
            first: whether they were not advanced before, where tensors closed over are found.

        Returns:
            The block.
        """
        states, known = [autodiff.variables(start)], set[int]()
        times = range(steps.start + 1, steps.stop + 1)
        controls = [step_control(self.control, t) for t in times]
        given = tree.distinct_leaves(controls) if first else []
        for t in times:
            following = self._step(states[-1], self.control, t)
            states.append(following if t == steps.stop else autodiff.told_apart(following, known))
        if first:
            _refuse_hidden(times, states, given)
        return Block(steps, states, controls)

    def advance(self, steps: range, state: Tree, control: Tree) -> Tree:
        """The state at the end of steps, none of them taped."""
        for t in range(steps.start + 1, steps.stop + 1):
            state = self._step(state, control, t)
            # Nothing here requires grad, unless the step closed over something that does.
            autodiff.refuse_hidden(state, (), f"step {t} of the dynamics")
        return state

    def follow(self, action: Action, control: Tree) -> None:
        """Keep, advance, load or drop."""
        i = action.block
        match action.do:
            case Do.KEEP:
                self.snapshots.put(i, self.state)
                previous = next(reversed(self.random.values()), self.random_start)
                self.random[i] = RandomState.capture(self.devices, previous)
            case Do.ADVANCE:
                steps = range(self.schedule.steps(self._at).start, self.schedule.steps(i).start)
                state, self.state = self.state, None
                self.state, self._at = self.advance(steps, state, control), i
            case Do.LOAD:
                self.state, self._at = self.snapshots.get(i), i
                self.random[i].restore()
            case Do.DROP:
                self.snapshots.drop(i)
                del self.random[i]

    def _reach(self, block: int, control: Tree) -> None:
        """Make the start of `block` the current state, from the last snapshot."""
        nearest = next(reversed(self.random))
        self.follow(Action(Do.LOAD, nearest), control)
        if nearest != block:
            self.follow(Action(Do.ADVANCE, block), control)
        elif block:  # kept beyond the schedule
            self.follow(Action(Do.DROP, block), control)


def _refuse_hidden(times: range, states: list[Tree], controls: list[Tensor]) -> None:
    """Refuse steps that close over a tensor that requires grad; `controls` are all leaves given."""
    # What a step did not compute was made a leaf of its own, when it was told apart.
    own = [
        x
        for state in states[1:-1]
        for x in tree.leaves_of(state)
        if isinstance(x, Tensor) and x.grad_fn is None
    ]
    try:
        autodiff.refuse_hidden(states[1:], (states[0], own, controls), "the dynamics")
    except LostGradientError:  # one walk over all is quick; which step it was is asked rarely
        for t, (state, following) in zip(times, pairwise(states), strict=True):
            autodiff.refuse_hidden(following, (state, own, controls), f"step {t} of the dynamics")
        raise


def watch(values: Tree) -> Callable[[], bool]:
    """Tells, when called, whether a tensor was written to since, or another put in its place."""
    if isinstance(values, Tensor):
        version = values._version
        return lambda: values._version != version
    leaves = tree.leaves_of(values)
    versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]

    def written() -> bool:
        now = tree.leaves_of(values)
        if len(now) != len(leaves) or not all(map(is_, now, leaves)):
            return True
        return versions != [leaf._version for leaf in now if isinstance(leaf, Tensor)]

    return written


def _check_deterministic(again: Tree, expected: Tree, name: str) -> None:
    """Refuse a state that is not what the forward sweep found; half of the digits count."""
    # Some kernels are deterministic only to rounding, so equality to the last bit is too much.
    for new, old in zip(tree.leaves_of(again), tree.leaves_of(expected), strict=True):
        if not tree.is_variable(old) or torch.equal(new, old):
            continue
        tolerance = torch.finfo(old.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(old))
        if float(torch.linalg.vector_norm(new.detach() - old)) > tolerance:
            raise ArgumentError(
                f"{name} gave another state when evaluated again, although torch's default "
                "generators were restored: pass what is random in with the observation, or a field "
                "of the dynamics, or keep the graphs with Checkpointing(block=None)."
            )
