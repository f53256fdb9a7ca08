"""What processes say to each other: sums and short texts, and why one of them stopped.

A process that waits asks, once a second, whether another one has told of an error. So an error of
one is an error of all, and none waits for ever.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel.errors import ArgumentError, ParallelError

GLANCE = 1.0  # seconds between two looks at whether another process has failed
_sessions: dict[str, list[int]] = {}  # name of a group -> its id, runs begun, and depth of nesting


class Wire:
    """The processes of a group, as one of them.

    Attributes:
        rank: of this process in the group.
        size: number of processes.

    Raises:
        ArgumentError: if the group was never made, was destroyed, or this process is not in it.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        """Join a group, None being all processes."""
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "Replicas needs processes that know each other: call "
                "torch.distributed.init_process_group('gloo') first ('nccl' on GPUs), in a script "
                "that torchrun --nproc-per-node=K starts."
            )
        self._group = dist.group.WORLD if group is None else group
        try:
            self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise ArgumentError(
                "group must be a process group that torch.distributed.new_group made, or None for "
                f"all processes, got {type(group).__name__}: {error}"
            ) from error
        if self.rank < 0:
            raise ArgumentError(
                "this process is not in the group of its Replicas: call the solver on the "
                "processes of the group alone."
            )
        self._timeout = timeout
        self._name = getattr(self._group, "group_name", "") or "all"
        self.on_cpu = "gloo" in str(dist.get_backend(self._group))

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the processes, the same bits on each; written into the values."""
        self._wait(dist.all_reduce(values, group=self._group, async_op=True))
        return values

    def rows(self, values: Tensor) -> Tensor:
        """The values of each process, one row for each."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        self._wait(dist.all_gather(found, values, group=self._group, async_op=True))
        return torch.stack(found)

    def numbers(self, *values: int) -> list[list[int]]:
        """The whole numbers of each process."""
        return self.rows(torch.tensor(values, device=self._device)).tolist()

    def texts(self, text: str) -> list[str]:
        """The text of each process."""
        data = text.encode()
        longest = max(size for (size,) in self.numbers(len(data)))
        padded = [*data.ljust(longest, b"\0")]
        rows = self.rows(torch.tensor(padded, dtype=torch.uint8, device=self._device)).tolist()
        return [bytes(row).rstrip(b"\0").decode() for row in rows]

    @property
    def _device(self) -> torch.device:
        """Where small messages lie."""
        if self.on_cpu:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def session(self) -> Iterator[bool]:
        """An error inside is told to those who wait; all processes begin the same ones in turn.

        Yields:
            Whether it is not inside of another.
        """
        known = _sessions.setdefault(self._name, [0, 0, 0])
        if known[0] != id(self._group):
            known[:] = [id(self._group), 0, 0]
        if known[2]:
            yield False
            return
        known[1] += 1
        known[2] = 1
        try:
            yield True
        except BaseException as error:
            said = f"rank {self.rank}: {type(error).__name__}: {error}"
            with suppress(Exception):  # the store may be gone with the process that held it
                _store().set(self._key, said[:2000])
            raise
        finally:
            known[2] = 0

    @property
    def at_work(self) -> bool:
        """Whether this process is inside of a session."""
        return _sessions.get(self._name, [0, 0, 0])[2] > 0

    @property
    def _key(self) -> str:
        return f"bilevel/{self._name}/{_sessions.get(self._name, [0, 0, 0])[1]}"

    def _failed(self) -> str:
        """What another process has told of an error; empty if nothing."""
        try:
            store = _store()
            return store.get(self._key).decode() if store.check([self._key]) else ""
        except Exception as error:
            return f"the store of the processes is gone, and who held it with it ({error})"

    def _wait(self, work: Any) -> None:
        """Until all have come, or one has failed, or the time is over."""
        if work is None:  # of a group that this process is not in
            return
        start = time.monotonic()
        while True:
            try:
                if self.on_cpu:
                    work.wait(timedelta(seconds=min(GLANCE, self._timeout)))
                    return
                if _came(work, min(GLANCE, self._timeout)):
                    work.wait()
                    return
            except RuntimeError as error:
                if "timed out" not in str(error).lower():
                    raise self._lost(error) from error
            if reason := self._failed():
                raise ParallelError(f"another process ended this run; {reason}")
            if time.monotonic() - start > self._timeout:
                raise ParallelError(
                    f"rank {self.rank} has waited for {self._timeout:g} s and not every process "
                    "came: one hangs, has ended, or went another way through the code, as by a "
                    "decision on its own data. Where one may take longer, raise "
                    "Replicas(timeout=)."
                )

    def _lost(self, error: RuntimeError) -> ParallelError:
        time.sleep(GLANCE / 4)  # who closed the connection may have said why
        reason = self._failed() or (
            "the connection to it is lost, so that it has died or was killed: look at its own "
            f"output. From torch.distributed came: {str(error).splitlines()[0][:300]}"
        )
        return ParallelError(f"another process ended this run; {reason}")


def _store() -> Any:
    """What all processes can read and write, whatever the group."""
    return dist.distributed_c10d._get_default_store()


def _came(work: Any, seconds: float) -> bool:
    """Whether work on a GPU is done within some seconds."""
    end = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() > end:
            return False
        time.sleep(0)
    return True
