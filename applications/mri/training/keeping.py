"""Progress and records: what a run reports, and what it leaves behind while it goes on."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import bilevel as bl
from applications.errors import InputError
from applications.files import make_folder
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, save_weights
from applications.mri.training.resuming import StateFile
from applications.mri.training.training import AfterStep, TrainingState
from applications.records import Report

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


@contextmanager
def tensorboard(folder: Path) -> Iterator[AfterStep]:
    """Writes the loss, the learning rate and the validation loss of a training.

    Args:
        folder: for TensorBoard's files; `tensorboard --logdir FOLDER` shows them.

    Yields:
        What `train` tells of every update.

    Raises:
        InputError: if TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"TensorBoard was needed to write to {folder}, and cannot be imported ({error}): "
            'pip install "bilevel[tensorboard]", or leave --tensorboard out.'
        ) from error
    with SummaryWriter(str(make_folder(folder))) as writer:

        def told(state: TrainingState) -> None:
            writer.add_scalar("loss/training", state.cost, state.step)
            writer.add_scalar("learning_rate", state.rate, state.step)
            if state.look is not None:
                writer.add_scalar("loss/validation", state.look.cost, state.step)

        yield told
