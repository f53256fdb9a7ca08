"""How a run is kept, and how it goes on after a divergence: the settings."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from bilevel.checks import check_kind, check_range, check_whole
from bilevel.errors import ArgumentError
from bilevel.outer.checkpoints import INSIDE
from bilevel.outer.encoding import Encoder
from bilevel.outer.generators import Standing
from bilevel.sweeps.disk import entries


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
