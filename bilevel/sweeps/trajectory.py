"""A swept trajectory: the forward sweep (6a), (6b), then its blocks taped again, last block first.

Nothing here knows costs or multipliers; `bilevel.control` does. A *taped* step runs on variable
trees, so that its graph can be pulled back; the graph of one block lives at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import dropwhile, islice, takewhile
from typing import Any, Self

from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.closures import buffers_kept
from bilevel.dynamics.dynamics import Dynamics
from bilevel.dynamics.per_step import check_control, step_control
from bilevel.dynamics.steps import Step, begun, stepped, watch
from bilevel.errors import ArgumentError
from bilevel.sweeps.block import Block, Costs, no_costs, refuse_hidden
from bilevel.sweeps.checkpointing import Checkpointing
from bilevel.sweeps.determinism import check_same_gradient, check_same_state, source
from bilevel.sweeps.randomness import RandomState, devices_of, looking, preserved
from bilevel.sweeps.schedule import Action, Do
from bilevel.sweeps.storage import MemorySnapshots, Snapshots
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Halt:
    """Where a sweep halts, between two steps that are not taped or two blocks that are.

    Attributes:
        actions: of the schedule that are behind it.
        t: of `state`.
        state: u(t), None after a block.
        following: the state that the block to be taped next must lead to; None before all.
        final: u(T); None before the end of the forward sweep.
        kept: blocks whose snapshots there are, the last one last.
        forward_steps: as in `Trajectory`.
        draws: as in `Trajectory`.
        draw_costs: whether costs are evaluated for what they draw.
        random_start: of the generators, before g0.
        random: of them at the last snapshot; empty if they stood as before g0.
    """

    actions: int
    t: int
    state: Tree
    following: Tree
    final: Tree
    kept: list[int]
    forward_steps: int
    draws: bool
    draw_costs: bool
    random_start: tuple[Tensor, ...]
    random: tuple[Tensor, ...]


class Trajectory:
    """One forward sweep and what it leaves behind, enough to tape every block again, once.

    Made, swept `forward`, then asked for `n_blocks` times `tape_previous` and once `tape_initial`,
    and closed. It owns its state: what it keeps, where it stands and what it has taped is seen and
    changed by its methods alone.

    Attributes:
        observation: f, a variable tree.
        control: Theta, a variable tree.
        devices: those whose random generators a step may use.
        final: u(T), detached; None before the forward sweep.
        forward_steps: steps evaluated so far, taped or not.
        horizon: number of steps, T.
        draws: whether the forward sweep drew from them, so that it must be replayed with the same
            draws; another thread that draws meanwhile is taken for it.
        random_start: state of the generators before g0.
        last: steps of the block that was taped last; none at first.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        observation: Tree,
        control: Tree,
        horizon: int,
        checkpointing: Checkpointing,
        costs: Costs = no_costs,
        watched: Callable[[], None] | None = None,
        running: object = None,
    ) -> None:
        """Stand before u(0).

        `costs` are evaluated before each step, where they may draw; `running` is what they come
        from. `watched` is called after each step that is not taped, when `halt` tells where it
        stands.
        """
        check_control(control, horizon)
        tree.check_leaves(observation, "observation")
        self.observation: Tree = autodiff.variables(observation)
        self.control: Tree = autodiff.variables(control)
        self.devices = devices_of((observation, control))
        self.final: Tree = None
        self.forward_steps = 0
        self.draws, self.horizon = False, horizon
        self.last = range(horizon, horizon)
        self.random_start: RandomState
        self._dynamics, self._checkpointing = dynamics, checkpointing
        self._costs, self._watched, self._running = costs, watched, running
        # Costs of steps that are not taped count for what they draw alone.
        self._draw_costs = costs is not no_costs
        self._schedule = checkpointing.schedule(horizon)
        # Steps that are not taped get these.
        self._untaped: Tree = tree.detach((observation, control))
        # What was kept: states at starts of blocks, each with the random state there.
        self._snapshots: Snapshots | None = None
        self._kept: list[int] = []
        self._random: RandomState  # of the last one
        # What was taped on the way forward, to be handed out instead of being taped again.
        self._taped_initial: Tree = None
        self._taped_last: Block | None = None
        # Where it stands: u(_t), None while a block is reversed; the state that the block to be
        # taped next must lead to; and how many actions are behind it.
        self._state: Tree = None
        self._t = 0
        self._following: Tree = None
        self._done = 0
        self._actions = dropwhile(_advances, self._schedule.actions())

    @property
    def n_blocks(self) -> int:
        """How often `tape_previous` serves."""
        return self._schedule.n_blocks

    def close(self) -> None:
        """Forget every snapshot, and leave no file behind."""
        if self._snapshots is not None:
            self._snapshots.close()
        self._kept.clear()
        self._state = self._following = self._taped_last = self._taped_initial = None

    def forward(self, *, tape_last: bool) -> Self:
        """u(0) = g0(f; theta_0) and u(t) = g(u(t-1), theta_t), t = 1..T.

        Args:
            tape_last: tape the last block at once, because it will be reversed before anything
                else is taped; it then is not evaluated twice. Else the trajectory is kept for
                later.

        Returns:
            Itself; to be closed by who asked for it.

        Raises:
            StructureError: if a step changes the structure.
            LostGradientError: if the dynamics closes over a tensor that requires grad.
            ArgumentError: if the dynamics writes to its arguments.
        """
        written = watch((self._untaped, self.observation, self.control))
        begins = self._snapshots is None
        try:
            with autodiff.recording():
                if begins:
                    self.random_start = self._random = RandomState.capture(self.devices)
                    self._begin()
                self._advance_to_last()
                self._finish(tape_last=tape_last)
            self.draws = not self.random_start.stands()
            self._draw_costs &= self.draws
            if written():
                raise ArgumentError(
                    "the dynamics writes to its observation or its control in place: clone them "
                    "first."
                )
        except BaseException:
            self.close()
            raise
        return self

    def _begin(self) -> None:
        if self._checkpointing.keeps_graphs:
            given = self.observation, self.control
            self._taped_initial = state = begun(self._dynamics, *given)
            autodiff.refuse_hidden(state, given, "dynamics.init")
            state = tree.detach(state)
        else:
            self._snapshots = self._checkpointing.storage.open()
            state = begun(self._dynamics, *self._untaped)
            autodiff.refuse_hidden(state, (), "dynamics.init")
        self.devices |= devices_of(state)
        self.random_start = self._random = self.random_start.with_devices(self.devices)
        self._state = state

    def _advance_to_last(self) -> None:
        if not self._checkpointing.keeps_graphs:  # else the last block is all of them
            left = islice(self._schedule.actions(), self._done, None)
            for action in takewhile(_advances, left):
                self._follow(action)

    def _finish(self, *, tape_last: bool) -> None:
        """From the start of the last block to u(T)."""
        last, state = self.n_blocks - 1, self._state
        if last < 0:
            self.final = state
        elif tape_last or self._checkpointing.keeps_graphs:
            self._state = None
            self._taped_last = block = self.tape(self._schedule.steps(last), state, first=True)
            self.final = tree.detach(block.states[-1])
        else:
            # For later: the last block has to be reached again. Where there is room beyond the
            # schedule its start is kept, and dropped when it is reached (`_reach`).
            allowed = self._checkpointing.snapshots or self.n_blocks
            if last not in self._kept and len(self._kept) < allowed:
                self._follow(Action(Do.KEEP, last))
            self._state = None
            self.final = self.advance(self._schedule.steps(last), state)
        self._following = self.final

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, blocks are taped again; generators and buffers leave it as they entered it."""
        if self._checkpointing.keeps_graphs and self._taped_last is not None:
            yield  # everything is taped
            return
        with self._rewound(), buffers_kept(self._dynamics, self._costs):
            yield

    def _rewound(self) -> AbstractContextManager[Any]:
        # Where nothing was drawn they are not touched: another thread may be drawing.
        return preserved(self.devices) if self.draws else nullcontext()

    def tape_previous(
        self, step: Step | None = None, compared: Callable[[Tree], Tree] = lambda state: state
    ) -> Block:
        """The block before the one taped last, beginning with the last of all.

        The caller lets go of a block before it asks for the next: the graph of one lives at a time.

        Args:
            step: taken in place of that of the dynamics; the same u(t).
            compared: what of a state must be the same when it is evaluated again.

        Returns:
            The taped block.

        Raises:
            ArgumentError: if a step, evaluated again, gives another state.
        """
        action = next(self._actions)
        while action.do is not Do.TAPE:
            self._follow(action)
            action = next(self._actions)
        self._done += 1
        self.last = self._schedule.steps(action.block)
        block, self._taped_last = self._taped_last, None
        if block is None:
            if self._state is None:  # as a sweep that was kept for later leaves it
                self._reach(action.block)
            steps = self._schedule.steps(action.block)
            self._check_gradient(steps.start + 1, self._state, step)
            block = self.tape(steps, self._state, step=step)
            name = f"steps {steps.start + 1} to {steps.stop} of the dynamics"
            again, expected = compared(block.states[-1]), compared(self._following)
            whole = (self.n_blocks - action.block).bit_count() == 1
            check_same_state(again, expected, name, whole=whole)
        self._state = None
        self._following = tree.detach(block.states[0])
        return block

    def _check_gradient(self, t: int, start: Tree, step: Step | None) -> None:
        """Two evaluations of step t more, at the first replay of what the steps come from."""

        def taped() -> Block:
            with self._rewound(), looking():
                return self.tape(range(t - 1, t), start, step=step)

        steps = self.forward_steps
        origins = [self._dynamics.origin]
        if self._costs is not no_costs:
            origins.append(source(self._running))
        check_same_gradient(origins, taped)
        self.forward_steps = steps  # those of the schedule are counted

    def tape_initial(self) -> Tree:
        """u(0) with the graph of g0 in the observation and the control; after the blocks, once."""
        for action in self._actions:  # nothing but snapshots to be dropped
            self._follow(action)
        state, self._taped_initial = self._taped_initial, None
        if state is None:
            self._rewind(self.random_start)
            state = begun(self._dynamics, self.observation, self.control)
            check_same_state(state, self._following, "dynamics.init", whole=True)
        return state

    def tape(
        self, steps: range, start: Tree, *, step: Step | None = None, first: bool = False
    ) -> Block:
        """Steps taped from the state at their start."""
        times = range(steps.start + 1, steps.stop + 1)
        controls = [step_control(self.control, t) for t in times]
        block = Block(steps, [autodiff.variables(start)], controls, [])
        states, known = block.states, set[int]()
        given = tree.distinct_leaves(block.controls) if first else []
        for t, theta in zip(times, controls, strict=True):
            if self._costs is not no_costs:
                block.costs.extend(self._costs(states[-1], theta, t))
            following = stepped(step or self._dynamics.step, states[-1], self.control, t)
            states.append(following if t == steps.stop else autodiff.told_apart(following, known))
        self.forward_steps += len(steps)
        autodiff.forget_casts()
        if first:
            refuse_hidden(block, given)
        return block

    def advance(self, steps: range, state: Tree) -> Tree:
        """The state at the end of steps, none of them taped."""
        control = self._untaped[1]
        for t in range(steps.start + 1, steps.stop + 1):
            if self._draw_costs:
                costs = self._costs(state, step_control(control, t), t)
                autodiff.refuse_hidden(costs, (), "the running cost")
            before, state = state, stepped(self._dynamics.step, state, control, t)
            # Nothing here requires grad, unless the step closed over something that does, or asked
            # its arguments to: taped, which they are then, it shows what is lost.
            if autodiff.is_taped(state):
                with preserved(self.devices):
                    self.tape(range(t - 1, t), before, first=True)
                self.forward_steps -= 1
                state = tree.detach(state)
            del before
        self.forward_steps += len(steps)
        return state

    def _follow(self, action: Action) -> None:
        """Keep, advance, load or drop."""
        i = action.block
        if self._checkpointing.keeps_graphs or self._snapshots is None:
            return  # one block, which is taped at once
        match action.do:
            case Do.KEEP:
                self._random = RandomState.capture(self.devices, self._random)
                drawn = self._random is not self.random_start
                self._snapshots.put(i, (self._state, self._random.tensors() if drawn else ()))
                self._kept.append(i)
            case Do.ADVANCE:
                stop = self._schedule.steps(i).start
                while self._t < stop:
                    steps = range(self._t, stop if self._watched is None else self._t + 1)
                    state, self._state = self._state, None  # not held while the steps go on
                    self._state, self._t = self.advance(steps, state), steps.stop
                    if self._watched is not None:
                        del state
                        self._watched()
            case Do.LOAD:
                (self._state, random), self._t = (
                    self._snapshots.get(i),
                    self._schedule.steps(i).start,
                )
                self._rewind(self._random.like(random) if random else self.random_start)
            case Do.DROP:
                self._snapshots.drop(i)
                self._kept.remove(i)
        self._done += 1

    def _rewind(self, state: RandomState) -> None:
        if self.draws:
            state.restore()

    def _reach(self, block: int) -> None:
        """Make the start of the last block the current state, from the last snapshot."""
        nearest = self._kept[-1]
        self._follow(Action(Do.LOAD, nearest))
        if nearest != block:
            self._follow(Action(Do.ADVANCE, block))
        elif block:  # kept beyond the schedule
            self._follow(Action(Do.DROP, block))

    def halt(self) -> Halt:
        """Where it stands; of its snapshots, which they are."""
        drawn = self._random is not self.random_start
        return Halt(
            self._done,
            self._t,
            self._state,
            self._following,
            self.final,
            [*self._kept],
            self.forward_steps,
            self.draws,
            self._draw_costs,
            self.random_start.tensors(),
            self._random.tensors() if drawn else (),
        )

    def snapshot(self, block: int) -> Any:
        """What is kept of the start of a block: the state, and where generators stood."""
        assert self._snapshots is not None  # `halt` names it
        return self._snapshots.get(block)

    def stand(self, where: Halt, snapshots: Iterator[Any]) -> None:
        """Stand where another sweep of the same trajectory stood, which it was not moved from.

        Args:
            where: it told.
            snapshots: those that it names, in that order; each is put away as it comes.
        """
        self.devices |= devices_of((where.state, where.following, where.final))
        now = RandomState.capture(self.devices)
        self.random_start = self._random = now.like(where.random_start)
        if where.random:
            self._random = now.like(where.random)
        self._snapshots = self._checkpointing.storage.open()
        for block in where.kept:
            self._snapshots.put(block, next(snapshots))
            self._kept.append(block)
        self._done, self._t, self._state = where.actions, where.t, where.state
        self.final, self._following = where.final, where.following
        self.forward_steps, self.draws = where.forward_steps, where.draws
        self._draw_costs = where.draw_costs
        if self.final is not None:
            behind = islice(self._schedule.actions(), self._done)
            taped = [action.block for action in behind if action.do is Do.TAPE]
            self.last = self._schedule.steps(taped[-1]) if taped else self.last
            self._actions = islice(self._schedule.actions(), self._done, None)

    def park(self) -> Tree:
        """Hand over what is worth keeping with a graph; `resumed` takes it again."""
        # Snapshots in memory that no other will replace serve every reversal, and are handed over.
        # Others are used up by one reversal and stay here, for the first.
        lasting: dict[int, Tree] = {}
        every = self._schedule.snapshots >= self.n_blocks - 1
        if every and isinstance(self._snapshots, MemorySnapshots):
            lasting, self._snapshots = self._snapshots.states, None
        handed = lasting, self.final
        self.observation = self.control = self.final = self._untaped = self._following = None
        return handed

    def resumed(self, observation: Tree, control: Tree, handed: Tree) -> "Trajectory":
        """A trajectory of the same sweep, to be reversed; swept again if its snapshots are gone.

        Args:
            observation: f, as it was.
            control: Theta, as it was.
            handed: what `park` handed over.

        Returns:
            The trajectory; to be closed by who asked for it.
        """
        lasting, final = tree.detach(handed)
        given = self._dynamics, observation, control, self.horizon, self._checkpointing
        again = Trajectory(*given, self._costs, running=self._running)
        again.devices |= self.devices
        if lasting:
            again._snapshots = MemorySnapshots(lasting)
        elif self._snapshots is not None:
            again._snapshots, self._snapshots = self._snapshots, None
        else:
            self._rewind(self.random_start)
            return again.forward(tape_last=True)
        again._kept, again._random, again.random_start = (
            [*self._kept],
            self._random,
            self.random_start,
        )
        again.draws, again._draw_costs = self.draws, self._draw_costs
        again.final = again._following = final
        return again


def _advances(action: Action) -> bool:
    """Whether an action of the schedule belongs to the forward sweep, as long as all before do."""
    return action.do is not Do.TAPE
