"""A sweep that outlives faults: what is kept of it on its way, and what it goes on from."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.closures import buffers_kept, buffers_of
from bilevel.dynamics.per_step import GradientSum
from bilevel.dynamics.problem import ControlProblem
from bilevel.dynamics.steps import begun
from bilevel.errors import ArgumentError, DivergenceError, UnsupportedError
from bilevel.outer.encoding import described
from bilevel.outer.generators import Generators, Standing
from bilevel.outer.keep import Keep
from bilevel.outer.keeping import Kept, opened
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.disk import entries
from bilevel.sweeps.memory import Plans, bytes_of, planned
from bilevel.sweeps.randomness import preserved
from bilevel.sweeps.trajectory import Halt, Trajectory
from bilevel.tree import Tree

PART = 2**23  # bytes of snapshots that are written as one file, a single larger one apart


@dataclass(eq=False)
class Reversal:
    """What a multiplier sweep carries from block to block.

    Attributes:
        multiplier: lambda_a, after steps a+1, ..., T were reversed; None in it stands for zero.
        cost: of the end; a rollout has none.
        running: sum of the running costs, real scalar.
        states: u(T), ..., u(a), if they are asked for.
        multipliers: lambda_T, ..., lambda_a, if they are asked for.
    """

    multiplier: Tree
    cost: Any = None
    running: Tensor | float = 0.0
    states: list[Tree] = field(default_factory=list)
    multipliers: list[Tree] = field(default_factory=list)


class KeptSweep:
    """A sweep under way, as `adjoint` sees it; one that is not kept is told of nothing."""

    def __init__(
        self,
        kept: Kept | None,
        keep: Keep | None,
        problem: ControlProblem,
        given: tuple[Tree, Tree],
    ) -> None:
        # Made by `kept_sweep`.
        self._keep, self._problem, self._given = keep, problem, given
        self._kept = kept
        self._functions = problem.dynamics, problem.terminal, problem.running
        self._own = Generators(*self._functions) if kept else None
        self._files: dict[int, str] = {}  # of snapshots that are written, by their blocks
        # Where generators stood and what buffers were when the end had been evaluated, which is how
        # the replay leaves them; and where generators stood inside of it.
        self._ended: Any = None
        self._buffers: list[Tensor] | None = None
        self._replayed: Any = None
        self._trajectory: Trajectory
        self._gradient: GradientSum
        self._reversal: Reversal | None = None
        self._structure: optree.PyTreeSpec | None = None
        self._plan: Checkpointing

    @property
    def watched(self) -> Callable[[], None] | None:
        """What a trajectory tells of its steps."""
        return None if self._kept is None else self.after

    def planned(self, checkpointing: Checkpointing | Budget | None) -> Checkpointing:
        """What was asked for; of a budget, as it was planned when the sweep began."""
        longest = None if self._keep is None else self._keep.every
        if self._kept is None or self._kept.state is None or not isinstance(checkpointing, Budget):
            chosen = planned(checkpointing, self._problem, *self._given, longest=longest)
        else:
            snapshots, block = self._kept.state["plan"]
            chosen = Checkpointing(snapshots, block, checkpointing.storage)
        if chosen.keeps_graphs and self._kept is not None:
            raise ArgumentError(
                "a sweep is kept between its blocks, and block=None makes it one: give "
                "Checkpointing(), a block of some steps, or a Budget."
            )
        self._plan = chosen
        return chosen

    def begin(self, trajectory: Trajectory, gradient: GradientSum) -> Reversal | None:
        """Stand where the sweep was kept; what its reversal carries, None before it begins."""
        self._trajectory, self._gradient = trajectory, gradient
        if self._kept is None or self._kept.state is None:
            return None
        state = self._kept.state
        where: Halt = state["halt"]
        with autodiff.recording(), preserved(trajectory.devices), buffers_kept(*self._functions):
            first = begun(self._problem.dynamics, *tree.detach(self._given))
        self._structure = tree.flatten(first)[1]
        trees = {n: self._tree(getattr(where, n)) for n in ("state", "following", "final")}
        trajectory.stand(replace(where, **trees), self._snapshots(where.kept, state["snapshots"]))
        gradient.load(state["gradient"])
        if state["reversal"] is not None:
            carried: Reversal = state["reversal"]
            self._reversal = replace(
                carried,
                multiplier=self._tree(carried.multiplier),
                states=[self._tree(x) for x in carried.states],
                multipliers=[self._tree(x) for x in carried.multipliers],
            )
        with torch.no_grad():
            for buffer, value in zip(buffers_of(*self._functions), state["buffers"], strict=True):
                buffer.copy_(value)
        self._buffers = None if self._reversal is None else state["buffers"]
        self._stand(state["generators"])
        self._kept.forget()
        return self._reversal

    def _stand(self, generators: Mapping[str, Any]) -> None:
        """Set generators; those of torch go back, after the replay, to where they were before."""
        self._ended, now = generators["ended"], generators["now"]
        self._replayed = None if self._ended is None else now
        Standing.of(self._ended or now).restore()
        assert self._own is not None
        self._own.load_state_dict(generators["own"])

    def reverse(self, reversal: Reversal) -> None:
        """The end was evaluated, and the blocks come next."""
        if self._kept is not None:
            self._reversal, self._ended = reversal, Standing.now().state_dict()
            self._buffers = [x.clone() for x in buffers_of(*self._functions)]

    def replay(self) -> None:
        """Inside of the replay: generators stand where they stood there."""
        if self._replayed is not None:
            Standing.of(self._replayed).restore()

    def after(self) -> None:
        """A step that is not taped, or a block, is behind it."""
        if self._kept is not None:
            self._kept.after(self._trajectory.forward_steps, self._state)

    def end(self) -> None:
        """All blocks are behind it, or as many as were asked for."""
        if self._kept is not None:
            self._kept.end(self._trajectory.forward_steps, self._state)

    def _state(self) -> Mapping[str, Any]:
        where, carried = self._trajectory.halt(), self._reversal
        self._check_finite(where)
        self._write(where.kept)
        leaves = {n: _leaves(getattr(where, n)) for n in ("state", "following", "final")}
        assert self._own is not None
        return {
            "halt": replace(where, **leaves),
            "gradient": self._gradient.gathered(),
            "reversal": carried
            and replace(
                carried,
                multiplier=_leaves(carried.multiplier),
                states=[_leaves(x) for x in carried.states],
                multipliers=[_leaves(x) for x in carried.multipliers],
            ),
            "generators": {
                "now": Standing.now().state_dict(),
                "ended": self._ended,
                "own": self._own.state_dict(),
            },
            "buffers": self._buffers or buffers_of(*self._functions),
            "plan": (self._plan.snapshots, self._plan.block),
            "snapshots": [(name, len([*run])) for name, run in groupby(self._files.values())],
            "files": sorted({*self._files.values()}),
        }

    def _check_finite(self, where: Halt) -> None:
        carried = self._reversal
        parts = {
            f"u({where.t})": where.state,
            "the multiplier": carried and carried.multiplier,
            "the gradient": self._gradient.sums(),
        }
        for name, part in parts.items():
            if not math.isfinite(tree.norm(part)):
                raise DivergenceError(
                    f"{name} is not finite after {where.forward_steps} steps of the sweep, and is "
                    "not kept: look for a square root or a division at zero, or take a smaller "
                    "step size."
                )

    def _write(self, blocks: list[int]) -> None:
        """The files of snapshots, each written once, and not held together."""
        assert self._kept is not None
        self._files = {b: self._files[b] for b in blocks if b in self._files}
        waiting: dict[int, Any] = {}
        size, new = 0, [b for b in blocks if b not in self._files]  # which are the last ones
        for block in new:
            state, random = self._trajectory.snapshot(block)
            waiting[block] = [_leaves(state), [*random]]
            size += bytes_of((state, random))
            if block == new[-1] or size >= PART:
                name = self._kept.put(waiting)
                self._files.update(dict.fromkeys(waiting, name))
                waiting, size = {}, 0

    def _snapshots(self, blocks: list[int], files: list[tuple[str, int]]) -> Iterator[Any]:
        assert self._kept is not None
        each = (name for name, times in files for _ in range(times))
        self._files = dict(zip(blocks, each, strict=True))
        name, found = "", {}
        for block in blocks:
            if self._files[block] != name:
                name = self._files[block]
                found = self._kept.get(name)
            leaves, random = found.pop(block)
            yield self._tree(leaves), tuple(random)

    def _tree(self, leaves: list[Any] | None) -> Tree:
        assert self._structure is not None
        return None if leaves is None else tree.unflatten(self._structure, leaves)


def _leaves(value: Tree) -> list[Any] | None:
    return None if value is None else tree.leaves_of(value)


RECORDS = {"halt": Halt, "reversal": Reversal}


@contextmanager
def kept_sweep(
    keep: Keep | None,
    resume: bool | int,
    problem: ControlProblem,
    given: tuple[Tree, Tree],
    checkpointing: Checkpointing | Budget | None,
    settings: Mapping[str, Any],
) -> Iterator[KeptSweep]:
    """A sweep that is kept, or is not.

    Args:
        keep: where and how often; None keeps nothing.
        resume: as in `opened`.
        problem: of the sweep.
        given: observation and control, whose values must be the same when it goes on.
        checkpointing: as it was asked for.
        settings: further ones that must be the same.

    Yields:
        What `adjoint` tells of it.
    """
    if keep is None:
        with opened(None, resume):
            yield KeptSweep(None, None, problem, given)
        return
    # Where snapshots wait is no matter of numbers: a run may go on with another disk.
    plan = checkpointing or Checkpointing()
    plan = {n: v for n, v in described(plan).items() if n != "storage"}
    conditions = {
        "problem": problem,
        "given": {**fingerprints(given[0], "observation"), **fingerprints(given[1], "control")},
        "checkpointing": plan,
        "autocast": [str(cast) for cast in autodiff.autocasts()],
        **settings,
    }
    with opened(keep, resume, {"sweep": conditions}, RECORDS) as kept:
        yield KeptSweep(kept, keep, problem, given)


class Sweeps:
    """How a solver sweeps: by which plans, and what keeps a sweep inside of an update."""

    def __init__(self, checkpointing: Checkpointing | Budget | None, keep: Keep | None) -> None:
        within = None if keep is None else keep.within
        self._plans, self._keep = Plans(checkpointing, within), keep

    def of(
        self, problem: ControlProblem, observation: Tree, control: Tree, place: tuple[int, ...]
    ) -> dict[str, Any]:
        """Arguments of `adjoint`; `place` as in `inside`."""
        plan = self._plans.of(problem, observation, control)
        values = {"observation": observation, "control": control}
        return {"checkpointing": plan, **inside(self._keep, place, **values)}


def inside(keep: Keep | None, place: tuple[int, ...], **values: Tree) -> dict[str, Any]:
    """Where the sweep of an update is kept: arguments of `adjoint`.

    Args:
        keep: of the run.
        place: of the sweep in it: the update, and which batch of it; batches need not be trees.
        values: that it begins from.

    Returns:
        Its own folder, which may hold a part of it.
    """
    if keep is None or keep.within is None:
        return {"keep": None, "resume": False}
    told: dict[str, Any] = {"place": place}
    for name, value in values.items():
        told |= fingerprints(value, name)
    return {"keep": keep.inside(told), "resume": True}


def check_within(keep: Keep | None, who: str) -> None:
    """Refuse to keep inside of updates that make no sweep of multipliers on one process."""
    if keep is not None and keep.within is not None:
        raise UnsupportedError(
            f"Keep(within={keep.within}) keeps a sweep of multipliers on one process, which {who} "
            "does not make: leave within= out."
        )


def fingerprints(values: Tree, name: str) -> dict[str, str]:
    """What the leaves are, and a checksum of their numbers: another point is another sweep."""
    found = {}
    for place, leaf in zip(tree.leaf_names(values, name), tree.leaves_of(values), strict=True):
        text = str(described(leaf))
        if isinstance(leaf, Tensor):
            plain = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
            text = f"{tree.kind(leaf)} {hashlib.sha256(entries(plain)).hexdigest()[:16]}"
        found[place] = text
    return found
