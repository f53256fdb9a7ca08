"""The course of a training for TensorBoard, if that is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from applications.errors import InputError
from applications.files import make_folder
from applications.mri.training import AfterStep, TrainingState


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
