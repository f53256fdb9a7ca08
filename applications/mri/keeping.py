"""Progress and records: what a run reports, and what it leaves behind while it goes on."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import bilevel as bl
from applications.command_line import Report
from applications.mri.reconstruction import Network
from applications.mri.resuming import StateFile
from applications.mri.training import TrainingState
from applications.mri.weights import Trained, save_weights

_SAVE_EVERY = 30.0  # seconds


class Keeper:
    """Reports the training, and saves its weights now and then, each time completely.

    `with keeper:` around the training makes Ctrl-C end it after the update at work, with that
    update saved; a second Ctrl-C ends it at once.
    """

    def __init__(
        self,
        path: Path,
        network: Network,
        record: dict,
        report: Report,
        state: StateFile | None = None,
    ) -> None:
        """Save to `path` what is told, and with it to `state` what a resumption needs."""
        self._path, self._network, self._record, self._report = path, network, record, report
        self._state = state
        self._saved = time.monotonic()
        self._interrupted = False
        self._handler: Any = None

    def __enter__(self) -> "Keeper":
        """Wait with an interrupt for the end of an update."""
        # Python drops a KeyboardInterrupt raised while a graph is freed: its weak references call
        # back, and what a callback raises is only printed. One in eight was lost.
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore how interrupts were handled."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            signal.default_int_handler(number, frame)
        self._interrupted = True

    def __call__(self, state: TrainingState) -> None:
        """Told of an update."""
        if self._interrupted or time.monotonic() - self._saved > _SAVE_EVERY:
            if self._state is not None:
                self._state.save(state.snapshot())
            self.save(state.kept)
        if self._interrupted:
            raise KeyboardInterrupt
        self._report("training", state.share)

    def finish(self, control: bl.PerStep) -> None:
        """Write the weights that the training ended with; there is nothing left to resume."""
        self.save(control)
        if self._state is not None:
            self._state.remove()

    def save(self, control: bl.PerStep) -> None:
        """Write the weights."""
        save_weights(self._path, Trained(self._network, control, self._record))
        self._saved = time.monotonic()


def describe(settings: object) -> dict[str, object]:
    """Settings as plain values, for a record of how a result was reached."""
    return {
        name: value if _is_plain(value) else repr(value) for name, value in vars(settings).items()
    }


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
