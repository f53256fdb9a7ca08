"""All that the rest of a descent depends on, put together and taken apart again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel.errors import ArgumentError, DivergenceError
from bilevel.outer.batches import Feed
from bilevel.outer.encoding import Records, described
from bilevel.outer.generators import Generators, Standing
from bilevel.outer.keep import Restore, Stateful
from bilevel.outer.keeping import Kept, logger

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a group of an optimiser, or its scheduler


@dataclass(frozen=True)
class Around:
    """What a solver adds to its descent.

    Attributes:
        parts: what it carries from one update to the next, by names.
        conditions: settings that must be the same when the run goes on.
        records: dataclasses that the parts may hold, by their names.
        roots: where generators are looked for.
    """

    parts: Mapping[str, Stateful] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    records: Records = field(default_factory=dict)
    roots: tuple[Any, ...] = ()


class Schedule:
    """A learning-rate scheduler, or none."""

    def __init__(
        self, make: Callable[[Optimizer], LRScheduler] | None, optimizer: Optimizer
    ) -> None:
        """Make it."""
        self._schedule: Any = None if make is None else make(optimizer)
        if make is not None and not callable(getattr(self._schedule, "step", None)):
            raise ArgumentError(
                "scheduler must be a function that returns a learning-rate scheduler, got "
                f"{type(self._schedule).__name__} from it; return the one that it makes."
            )

    def step(self, cost: float) -> None:
        """An update was made."""
        if isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step(cost)
        elif self._schedule is not None:
            self._schedule.step()

    def state_dict(self) -> Any:
        """Its state, without the functions that it was made with."""
        if self._schedule is None:
            return None
        return {n: v for n, v in self._schedule.state_dict().items() if not callable(v)}

    def load_state_dict(self, state: Any) -> None:
        """Go on from there."""
        if self._schedule is not None:
            self._schedule.load_state_dict(state)

    def scale(self, factor: float) -> None:
        """Multiply the rates that it goes by."""
        waiting = [self._schedule]
        while waiting:
            one = waiting.pop()
            waiting += getattr(one, "_schedulers", [])
            if hasattr(one, "base_lrs"):
                one.base_lrs = [x * factor for x in one.base_lrs]

    @property
    def conditions(self) -> Any:
        """What must be the same when a run goes on."""
        return {"class": type(self._schedule).__name__, **described(self.state_dict() or {})}


class Running:
    """A descent and what moves it: kept, gone on from, and gone back with.

    Attributes:
        conditions: that must be the same when the run goes on.
    """

    def __init__(
        self,
        descent: Stateful,
        optimizer: Optimizer,
        schedule: Schedule,
        feed: Feed | None,
        around: Around,
        restore: Restore | None,
    ) -> None:
        """Where nothing was done yet."""
        self._descent, self._optimizer, self._schedule = descent, optimizer, schedule
        self._feed, self._parts, self._restore = feed, around.parts, restore
        self._generators = Generators(feed, around.roots)
        self._restored: list[tuple[int, int]] = []  # from which update to which
        groups = [
            {n: described(v) for n, v in group.items() if n != "params"}
            for group in optimizer.param_groups
        ]
        self.conditions = {
            "optimizer": {"class": type(optimizer).__name__, "groups": groups},
            "scheduler": schedule.conditions,
            "batches": feed is not None,
            **{name: described(value) for name, value in around.conditions.items()},
        }

    def begin(self, kept: Kept) -> None:
        """Go on from where `kept` says, and know a good state."""
        if kept.state is not None:
            self._load(kept.state)
            if self._feed is not None:
                self._feed.load_state_dict(kept.state["batches"])
            self._generators.load_state_dict(kept.state["generators"]["own"])
            Standing.of(kept.state["generators"]["default"]).restore()
        if self._restore is not None or kept.within:
            kept.remember(self.state)
        if kept.active and self._feed is not None:
            self._feed.watch()

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "descent": self._descent.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._schedule.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "batches": None if self._feed is None else self._feed.state_dict(),
            "generators": {
                "default": Standing.now().state_dict(),
                "own": self._generators.state_dict(),
            },
            "restored": self._restored,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._descent.load_state_dict(state["descent"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["scheduler"])
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self._restored = [(a, b) for a, b in state["restored"]]

    def go_back(self, kept: Kept, error: DivergenceError, update: int) -> None:
        """To the last good state with a smaller step, where that was asked for and is left."""
        restore, done = self._restore, self._restored
        if restore is None:
            raise error
        if len(done) >= restore.times:
            error.add_note(f"It went back {len(done)} times before, with smaller steps each time.")
            raise error
        # A state that led no further than to where it ended before was not good enough.
        again = bool(done) and update <= max(came for came, _ in done)
        good, state = kept.good(done[-1][1] if again else None)
        kept.load_also(state)
        self._load(state)
        # A state that was kept after earlier returns has their smaller steps in it already.
        times = len(done) + 1 - len(self._restored)
        self._restored = [*done, (update, good)]
        for group in self._optimizer.param_groups:
            group.update({n: group[n] * restore.factor**times for n in _RATES if n in group})
        self._schedule.scale(restore.factor**times)
        kept.save(good, self.state)
        logger.warning(
            "%s Back to update %d, with learning rates times %g.",
            *(str(error), good, restore.factor**times),
        )

    @property
    def returns(self) -> int:
        """How often it went back."""
        return len(self._restored)
