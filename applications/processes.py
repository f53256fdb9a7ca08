"""A command on several processes, as `torchrun` starts them: the first one writes and speaks."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

import bilevel as bl
from applications.command_line import console

_PRESENT: ContextVar[bl.Replicas | None] = ContextVar("processes", default=None)


def present(*, split: bool) -> bl.Replicas | None:
    """The processes of the command at work, None if it is one alone.

    Args:
        split: of `bilevel.Replicas`.

    Returns:
        They.
    """
    known = _PRESENT.get()
    return None if known is None else bl.Replicas(known.group, known.timeout, split)


def common(value: float) -> float:
    """What the first process holds: a time, of which every process would read another."""
    known = _PRESENT.get()
    if known is None:
        return value
    mine = torch.tensor(value if not known.rank else 0.0, dtype=torch.float64)
    return _sum(known, mine)


def total(value: float) -> float:
    """The sum over the processes."""
    known = _PRESENT.get()
    return value if known is None else _sum(known, torch.tensor(value, dtype=torch.float64))


def _sum(known: bl.Replicas, value: torch.Tensor) -> float:
    (mean,) = known.mean([value], [value])
    return 0.0 if mean is None else float(mean) * known.size


@contextmanager
def processes(out: Path) -> Iterator[Path]:
    """Inside, the processes that `torchrun` started work together; without it, this one alone.

    Those after the first are silent, and write to a copy of what is there that is thrown away.

    Args:
        out: file or folder of results.

    Yields:
        Where this process writes its results.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield out
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if gpu else "gloo")
    token = _PRESENT.set(bl.Replicas())
    try:
        with _following(out) if dist.get_rank() else _leading(out) as place:
            yield place
    finally:
        _PRESENT.reset(token)
        dist.destroy_process_group()


@contextmanager
def _leading(out: Path) -> Iterator[Path]:
    dist.barrier()  # until the others have their copies
    yield out


@contextmanager
def _following(out: Path) -> Iterator[Path]:
    with TemporaryDirectory(prefix="rank-") as folder, _silent():
        for one in out.parent.glob(f"{out.name}*"):  # the state of a training lies beside it
            copy = shutil.copytree if one.is_dir() else shutil.copyfile
            copy(one, Path(folder, one.name))
        dist.barrier()
        yield Path(folder, out.name)


@contextmanager
def _silent() -> Iterator[None]:
    """No word, and an interruption is that of the first process, which then ends the others."""
    console.quiet = True  # to the end of the process
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        numbers = signal.SIGINT, signal.SIGTERM
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
