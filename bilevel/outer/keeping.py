"""Runs that outlive faults: what is kept while they go on, and what they go on from."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from bilevel.checks import check_kind, check_range, check_whole, is_whole
from bilevel.errors import ArgumentError, BilevelError, DivergenceError, StorageError
from bilevel.outer.checkpoints import INSIDE, Checkpoint, Folder
from bilevel.outer.encoding import Encoder, Records, decoded, described, first_not_finite
from bilevel.outer.generators import Standing
from bilevel.outer.signals import Interrupts
from bilevel.sweeps.disk import entries

logger = logging.getLogger("bilevel")
# What must be finite: variables, moments, inner states, linear solutions. A best value so far may
# begin at infinity.
_INNER = "parts.history"
_FINITE = ("descent.control", "optimizer", f"{_INNER}.last.warm", f"{_INNER}.warm")


@runtime_checkable
class Stateful(Protocol):
    """What says where it stands, and goes on from there, as modules and optimisers of torch do."""

    def state_dict(self) -> Any:
        """Tensors, numbers, text, None, and lists, tuples and dicts of them."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Go on from what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class Keep:
    """Keeps a run in a folder while it goes on, so that it can go on after whatever ends it.

    Every so many updates, at the end, and when Ctrl-C or SIGTERM comes, all that the rest of the
    run depends on is written: control, optimiser and scheduler, the inner state with its moments,
    the linear solution, generators, the place in the batches, and the history. On a CPU, with the
    same version of torch and number of threads, a run that goes on is bit by bit the one that was
    not interrupted. Files are safetensors with JSON, nothing in them is ever executed; each is
    written aside, synchronised and renamed, and has its checksum in its name. They hold finite
    numbers alone.

    Attributes:
        folder: for the checkpoints alone; made if need be. One run at a time can hold it.
        every: updates between two checkpoints; of a sweep, in `adjoint` and `hypergradient`, steps.
        last: how many checkpoints stay, the older ones are removed.
        also: what has a `state_dict` and a `load_state_dict` and belongs to the run, such as what
            a callback gathers.
        conditions: further plain values that must be the same when the run goes on.
        within: steps between two checkpoints inside of the sweep of an update, where one alone
            takes long; None keeps between updates only.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import tempfile, torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda state, control, t: state + control),
        ...     terminal=lambda state, control: state**2 / 2 + control**2,
        ...     horizon=3,
        ... )
        >>> solver = bl.ControlSolver(problem)
        >>> start = torch.tensor(0.0), torch.tensor(4.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keep = bl.Keep(folder, every=5)
        ...     half = solver.solve(*start, steps=10, keep=keep)
        ...     found = solver.solve(*start, steps=20, keep=keep, resume=True)
        >>> torch.equal(found.control, solver.solve(*start, steps=20).control)
        True
    """

    folder: str | Path
    every: int = 50
    last: int = 3
    also: Stateful | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    within: int | None = None

    def __post_init__(self) -> None:
        check_kind(self.folder, str | Path, "folder", "the path of a folder")
        check_whole(self.every, "every", 1)
        check_whole(self.last, "last", 1)
        check_whole(self.within, "within", 1, optional=True)
        stateful = "an object with state_dict and load_state_dict"
        check_kind(self.also, Stateful | None, "also", stateful)
        check_kind(self.conditions, Mapping, "conditions", "a dict of plain values")

    def inside(self, values: Mapping[str, Any]) -> "Keep | None":
        """Keeps a sweep inside of an update; None if `within` is.

        Args:
            values: what it begins from, as plain values. With those, and generators that stand
                where they stand now, it is the same sweep, which goes on where it was cut. The next
                checkpoint of the run is the end of those before it.

        Returns:
            A folder for this sweep alone, in that of the run.
        """
        if self.within is None:
            return None
        encoder = Encoder({})
        told = json.dumps([values, encoder.plain(Standing.now().state_dict(), "generators")])
        digest = hashlib.sha256(told.encode())
        for x in encoder.tensors.values():
            digest.update(entries(x))
        folder = Path(self.folder) / INSIDE / digest.hexdigest()[:32]
        return Keep(folder, self.within, 1)


@dataclass(frozen=True)
class Restore:
    """Goes back after a divergence: to the last good state, with a smaller step. It is logged.

    The last good state is the last that was kept, or would have been: one every 50 updates where
    nothing is kept. If that does not lead beyond the divergence, it is the one before. Control,
    moments and history go back; batches and generators go on.

    Attributes:
        factor: by which the learning rates are multiplied each time, those of a scheduler too.
        times: that it may happen in a run; then the divergence is an error.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.5), inner_steps=40, on_failure="ignore"
        ... )
        >>> found = solver.solve(
        ...     torch.tensor(0.0),
        ...     torch.tensor(3.0),
        ...     # Too large by far.
        ...     optimizer=lambda leaves: torch.optim.SGD(leaves, lr=1e30),
        ...     steps=50,
        ...     on_divergence=bl.Restore(factor=1e-31),  # 0.1 from then on
        ... )
        >>> round(float(found.control), 2)
        1.0
    """

    factor: float = 0.5
    times: int = 5

    def __post_init__(self) -> None:
        check_range(self.factor, "factor", above=0, below=1)
        check_whole(self.times, "times", 1)


OnDivergence = Literal["raise", "restore"] | Restore


def restoring(on_divergence: Any) -> Restore | None:
    """How to go back; None where a divergence is an error."""
    if isinstance(on_divergence, Restore):
        return on_divergence
    if on_divergence not in ("raise", "restore"):
        came = repr(on_divergence)
        raise ArgumentError(
            f"on_divergence must be 'raise', 'restore' or a Restore(...), got {came}."
        )
    return Restore() if on_divergence == "restore" else None


class Kept:
    """A run under way, as its loop sees it: `after` each update, `end` when it is over.

    Attributes:
        state: what the run goes on from; None where it begins.
    """

    def __init__(
        self,
        keep: Keep | None,
        folder: Folder | None,
        records: Records,
        interrupts: Interrupts,
        conditions: Any = None,
    ) -> None:
        # Made by `opened`.
        self._keep, self._folder, self._records = keep, folder, records
        self._interrupts, self._conditions = interrupts, conditions
        self._written: int | None = None
        self._seen = 0  # the last update that it was told of
        self._chosen: Checkpoint | None = None  # from which the run goes on
        # Good states where nothing is written, the newest last; None where nobody goes back.
        self._good: list[tuple[int, Any, dict[str, Tensor]]] | None = None
        self.state: Any = None

    def remember(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Know a good state from the beginning on."""
        if self._folder is None:
            self._good = []
        if self.state is None:
            self.save(0, state)

    @property
    def within(self) -> bool:
        """Whether sweeps of updates are kept too: also those of the first, from what it begins."""
        return self._keep is not None and self._keep.within is not None

    @property
    def active(self) -> bool:
        """Whether states are asked for."""
        return self._folder is not None or self._good is not None

    def good(self, before: int | None) -> tuple[int, Any]:
        """The last good state, or the last before an update, and after which update it was."""
        if self._folder is None:
            assert self._good  # `remember` was called
            older = [one for one in self._good if before is None or one[0] < before]
            self._good = older or self._good[:1]
            update, plain, tensors = self._good[-1]
        else:
            there = self._folder.checkpoints()
            older = [one for one in there if before is None or one.update < before]
            chosen = (older or there[-1:])[0]
            content, tensors = self._folder.read(chosen)
            self._folder.drop_after(chosen.update)
            update, plain = chosen.update, content["state"]
        return update, self._decoded(plain, tensors)

    def _decoded(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: decoded(value, tensors, self._records) for name, value in plain.items()}

    def after(self, update: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Told of an update; keeps it if it is its turn, or a signal waits, which is then raised.

        Args:
            update: that was made.
            state: gives what the run would go on from.

        Raises:
            StorageError: if the checkpoint cannot be written.
            DivergenceError: if what would be kept is not finite.
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM.
        """
        if not self.active:
            return
        waits = self._interrupts.came is not None
        every = 50 if self._keep is None else self._keep.every
        # A multiple of `every` was reached or, by what counts in larger steps, passed.
        turn, self._seen = update // every > self._seen // every, update
        if waits or turn:
            self.save(update, state)
        if waits:
            self._interrupts.deliver()

    def end(self, update: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """The run is over: keeps what it ended with."""
        if self._folder is not None and self._written != update:
            self.save(update, state)

    def save(self, update: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keeps a state now."""
        now = state()
        plain, tensors = self._encoded(update, now)
        if self._folder is not None:
            content = {"conditions": self._conditions, "state": plain}
            self._folder.write(update, content, tensors, now.get("files", ()))
            self._written = update
        elif self._good is not None:
            older = [one for one in self._good if one[0] < update]
            self._good = [*older[-2:], (update, plain, tensors)]

    def forget(self) -> None:
        """Let go of `state`, which the run has taken over."""
        self.state = None

    def put(self, value: Any) -> str:
        """Writes what several checkpoints have in common; what a state has under "files" names it.

        Args:
            value: as a state may hold it.

        Returns:
            Its name.

        Raises:
            StorageError: if it cannot be written.
        """
        assert self._folder is not None  # a run that is kept
        encoder = Encoder(self._records)
        return self._folder.put(encoder.plain(value, "part"), encoder.tensors)

    def get(self, name: str) -> Any:
        """What `put` was given, of the checkpoint that the run goes on from.

        Args:
            name: that `put` returned.

        Returns:
            The value.

        Raises:
            StorageError: if it cannot be read, or is not what was written.
        """
        assert self._folder is not None
        assert self._chosen is not None
        plain, tensors = self._folder.get(name, self._chosen)
        return decoded(plain, tensors, self._records)

    def _encoded(self, update: int, state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        also = None if self._keep is None else self._keep.also
        whole = {**state, "also": None if also is None else also.state_dict()}
        encoder = Encoder(self._records)
        plain = {name: encoder.plain(value, name) for name, value in whole.items()}
        bad = first_not_finite(encoder.tensors, _FINITE)
        if bad is not None:
            raise DivergenceError(
                f"iteration {update}: {bad} is not finite, although cost, gradient and control are;"
                " such a state is not kept. Take a smaller learning rate, or a wider dtype."
            )
        return plain, encoder.tensors

    def load_also(self, state: Mapping[str, Any]) -> None:
        """Give what is kept beside the run back to where it came from."""
        if self._keep is not None and self._keep.also is not None:
            self._keep.also.load_state_dict(state["also"])

    def load(self, resume: bool | int) -> None:
        """Find what the run goes on from."""
        folder = self._folder
        assert folder is not None  # `opened` saw to it
        there = folder.checkpoints()
        if resume is False and there:
            raise ArgumentError(
                f"{folder.path} holds checkpoints of an earlier run, the newest after update "
                f"{there[0].update}: pass resume=True to go on from it, or choose another folder."
            )
        if not there or resume is False:
            return
        chosen = there[0] if resume is True else _numbered(there, resume, folder.path)
        content, tensors = folder.read(chosen)
        try:
            _compare(content["conditions"], self._conditions, chosen.path)
            self.state = self._decoded(content["state"], tensors)
        except BilevelError:
            raise
        except Exception as error:  # of what has a checksum, and yet was not written here
            raise StorageError(
                f"{chosen.path}: the checkpoint holds no state of a run "
                f"({type(error).__name__} {str(error)[:200]}); start anew in another folder."
            ) from error
        folder.drop_after(chosen.update)
        self._written = self._seen = chosen.update
        self._chosen = chosen
        self.load_also(self.state)


def _numbered(there: list[Checkpoint], update: int, path: Path) -> Checkpoint:
    for one in there:
        if one.update == update:
            return one
    raise ArgumentError(
        f"{path} holds no checkpoint after update {update}, those there are of updates "
        f"{', '.join(str(one.update) for one in reversed(there))}."
    )


def _compare(was: Any, now: Any, path: Path) -> None:
    old, new = dict(_flat(was, "")), dict(_flat(now, ""))
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    if names:
        shown = "; ".join(f"{n} was {old.get(n)}, is {new.get(n)}" for n in sorted(names)[:12])
        more = f"; and {len(names) - 12} more" if len(names) > 12 else ""
        raise ArgumentError(
            f"{path}: a run goes on under the same settings only: {shown}{more}. Restore them, or "
            "start anew in another folder."
        )


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Settings by where they stand, such as `solver.inner_steps`."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}".strip("."))
    elif isinstance(value, list) and any(isinstance(x, Mapping) for x in value):
        for i, part in enumerate(value):
            yield from _flat(part, f"{name}[{i}]")
    else:
        yield name, value


@contextmanager
def opened(
    keep: Keep | None,
    resume: bool | int = False,
    conditions: Mapping[str, Any] | None = None,
    records: Records | None = None,
) -> Iterator[Kept]:
    """A run that is kept: what a loop of one's own needs to outlive faults as `solve` does.

    Args:
        keep: where and how often; None keeps nothing.
        resume: go on from the newest checkpoint, or from that after a given update; where there is
            none, begin.
        conditions: settings that must be the same when the run goes on, beside those of `keep`.
        records: dataclasses that its state may hold, by their names.

    Yields:
        What the loop tells of its updates; its `state` is what to go on from.

    Raises:
        ArgumentError: if the folder is none of checkpoints, of another problem or other settings,
            or holds an earlier run and `resume` is False.
        StorageError: if the folder cannot be used, or a checkpoint is damaged.
    """
    check_kind(keep, Keep | None, "keep", "a Keep(folder)")
    if not (isinstance(resume, bool) or is_whole(resume)):
        raise ArgumentError(f"resume must be True, False or a number of updates, got {resume!r}.")
    if keep is None:
        if resume is not False:
            raise ArgumentError(
                "resume needs the folder to go on from, got no keep: pass keep=Keep(folder)."
            )
        yield Kept(None, None, records or {}, Interrupts())
        return
    folder = Folder(Path(keep.folder), keep.last)
    told = json.loads(json.dumps(described({**(conditions or {}), **keep.conditions})))
    with folder.held(), Interrupts() as interrupts:
        kept = Kept(keep, folder, records or {}, interrupts, told)
        kept.load(resume)
        yield kept
