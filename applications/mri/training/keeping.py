"""Progress and records: what a run reports, and the weights that it leaves while it goes on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bilevel as bl
from applications.errors import InputError
from applications.files import make_folder
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, save_weights
from applications.mri.training.training import AfterStep, TrainingState
from applications.records import Report

_SAVE_EVERY = 30.0  # seconds


class Keeper:
    """Reports the training, and saves its weights now and then, each time completely.

    `with keeper:` around the training makes Ctrl-C and SIGTERM end it after the update at work,
    with the weights of that update saved; a second one ends it at once.
    """

    def __init__(self, path: Path, network: Network, record: dict, report: Report) -> None:
        """Save to `path` what is told."""
        self._path, self._network, self._record, self._report = path, network, record, report
        self._saved = time.monotonic()
        self._last: TrainingState | None = None
        self._interrupts = bl.outer.Interrupts()

    def __enter__(self) -> "Keeper":
        """Wait with an interrupt for the end of an update."""
        self._interrupts.__enter__()
        return self

    def __exit__(self, kind: object, error: object, *_: object) -> None:
        """Save the best weights, or those after the last whole update, if it was interrupted."""
        self._interrupts.__exit__(kind)
        reached, last = getattr(error, "progress", None), self._last
        if isinstance(error, KeyboardInterrupt | SystemExit) and last and reached is not None:
            present = last.kept is last.control
            self.save(reached.control if present else last.kept)

    def __call__(self, state: TrainingState) -> None:
        """Told of an update."""
        self._last = state
        waits = self._interrupts.came is not None  # of a kept training they come to its keep
        if waits or time.monotonic() - self._saved > _SAVE_EVERY:
            self.save(state.kept)
        self._interrupts.deliver()
        self._report("training", state.share)

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
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{folder}: TensorBoard needs a folder whose name is text in UTF-8; choose another."
        ) from None
    with SummaryWriter(str(make_folder(folder))) as writer:

        def told(state: TrainingState) -> None:
            writer.add_scalar("loss/training", state.cost, state.step)
            writer.add_scalar("learning_rate", state.rate, state.step)
            if state.look is not None:
                writer.add_scalar("loss/validation", state.look.cost, state.step)

        yield told
