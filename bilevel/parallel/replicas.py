"""Several processes as one solver: what each holds of a mean, and that all hold the same."""

import functools
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar, final

import torch
from torch import Tensor

from bilevel import shards, tree
from bilevel.checks import check_kind, check_range
from bilevel.errors import ArgumentError, ParallelError
from bilevel.outer.keep import Keep
from bilevel.parallel.agreement import checksum, described, differences, kinds, unread
from bilevel.parallel.parts import ADVICE, has_samples, parts_alike
from bilevel.parallel.wire import Wire
from bilevel.tree import Tree

# Arguments that are compared by their values, or may be of a process's own.
OF_EACH = {"self", "params", "control", "observation", "warm", "callback", "progress"}
OF_EACH |= {"keep", "resume", "batches", "inner_batch", "outer_batch", "linear_batch"}
P = ParamSpec("P")
R = TypeVar("R")
EVERY = 16  # calls from one comparison of all values to the next


@final
@dataclass(frozen=True)
class Replicas:
    """The processes that solve one problem together, each with its part of the batches.

    Every process runs the same program, as `torchrun` starts it. An objective is then the mean over
    the processes of what each evaluates on its part; gradients, products with second derivatives
    and costs are means likewise, so that params, control and all that is returned are the same on
    each, bit by bit. That is compared in the first call and in every sixteenth.

    Attributes:
        group: of `torch.distributed`; None is all processes.
        timeout: seconds that a process waits for the others before it ends with an error.
        split: whether a batch is that of all processes, of which each takes its part along the
            first axis, rank r the r-th; or, False, is the part of this process already, as of a
            `DistributedSampler`. None finds out, by whether all were given the same; and that the
            mean over the parts of a batch is the objective of all of it is then checked once, which
            True leaves out.

    Raises:
        ArgumentError: if a field is not what it should be, or `torch.distributed` was not
            initialised, or this process is not in the group.

    Example:
        >>> import torch, torch.distributed as dist
        >>> import bilevel as bl
        >>> store = dist.HashStore()  # torchrun has one of its own
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, alpha, batch: ((w - batch) ** 2).mean() + alpha * w**2,
        ...     outer=lambda w, alpha, batch: ((w - batch) ** 2).mean(),
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.1), 50, replicas=bl.Replicas()
        ... )
        >>> batch = torch.tensor([1.0, 3.0])
        >>> found = solver.hypergradient(torch.tensor(0.0), torch.tensor(1.0), batch, batch)
        >>> round(float(found.gradient), 3)
        1.0
        >>> dist.destroy_process_group()
    """

    group: Any = None
    timeout: float = 45.0
    split: bool | None = None
    _wire: Wire = field(init=False, repr=False, compare=False)
    _state: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_range(self.timeout, "timeout", above=0)
        check_kind(self.split, bool | None, "split", "True, False or None")
        object.__setattr__(self, "_wire", Wire(self.group, self.timeout))

    @property
    def rank(self) -> int:
        """Of this process in the group, from 0."""
        return self._wire.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self._wire.size

    @property
    def at_work(self) -> bool:
        """Whether a solver of this group is running."""
        return self._wire.at_work

    @contextmanager
    def session(self) -> Iterator[None]:
        """Inside, an error of one process ends all; where one is begun, all begin it."""
        Wire(self.group, self.timeout)  # the group may have been destroyed since
        with self._wire.session() as outermost:
            if outermost:
                self._state.clear()
            yield

    def mean(self, values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The mean over the processes of tensors.

        Args:
            values: of this process; None counts as zero.
            like: tensors of the shapes and dtypes of the values, the same on every process.

        Returns:
            The means, the same bits on each; None where every process has None.
        """
        found: list[Tensor | None] = [None] * len(like)
        places: dict[Any, list[int]] = {}
        for i, x in enumerate(like):
            places.setdefault((_summed_in(x.dtype), x.device), []).append(i)
        for (dtype, device), group in places.items():
            # One message for all of a dtype: their entries, then which of them there are.
            parts = [_flat(values[i], like[i], dtype) for i in group]
            there = [float(values[i] is not None) for i in group]
            sums = self._wire.add_up(
                torch.cat([*parts, torch.tensor(there, dtype=dtype, device=device)])
            )
            *parts, there = sums.split([*map(len, parts), len(group)])
            for i, part, n in zip(group, parts, there.tolist(), strict=True):
                if n:
                    found[i] = shards.like(_shaped(part / self.size, like[i]), like[i])
        return found

    def asks(self, name: str) -> bool:
        """Whether something is to be looked at now: once in a session, if batches are compared."""
        first = self.split is None and name not in self._state
        self._state[name] = 1
        return first

    def mean_of(self, values: Tree) -> Tree:
        """The mean over the processes of a tree, None where it has None on every one."""
        leaves, structure = tree.flatten(values)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        means = self.mean([leaves[i] for i in places], [leaves[i] for i in places])
        for i, mean in zip(places, means, strict=True):
            leaves[i] = mean
        return tree.unflatten(structure, leaves)

    @contextmanager
    def keeping(self, keep: Keep | None) -> Iterator[Keep | None]:
        """Where this process keeps a run: the first in the folder, others in a copy for them alone.

        Args:
            keep: of the run; the folder is one that all can read.

        Yields:
            That of this process.
        """
        if keep is None or not self.rank:
            if keep is not None:
                self._wire.numbers(0)  # when the others have their copies
            yield keep
            return
        with TemporaryDirectory(prefix="bilevel-rank-") as folder:
            if Path(keep.folder).is_dir():
                shutil.copytree(keep.folder, folder, dirs_exist_ok=True)
            self._wire.numbers(0)
            yield replace(keep, folder=folder)

    def any(self, decision: Any) -> bool:
        """Whether one process at least has decided for something."""
        return any(row[0] for row in self._wire.numbers(int(bool(decision))))

    def whole(self, value: Tensor) -> Tensor:
        """All of a tensor, of which each process may hold a part; detached."""
        return shards.whole(value)

    def begin(self, settings: dict[str, Any], values: dict[str, Tree]) -> None:
        """Compare what must be the same on every process.

        Args:
            settings: by name, as `described` puts them in words.
            values: by name; their bytes are compared in the first call and in every sixteenth.

        Raises:
            ParallelError: if something differs; it says what.
        """
        said: dict[str, str] = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
        for name, value in settings.items():
            described(value, name, said)
        for name, value in values.items():
            said |= kinds(value, name)
        calls = self._state["calls"] = self._state.get("calls", 0) + bool(values)
        looks = calls % EVERY == 1
        sums = [checksum(value) if looks else 0 for value in values.values()]
        each = self._wire.numbers(zlib.crc32(json.dumps(said).encode()), *sums)
        if each.count(each[0]) == self.size:
            return
        if len({row[0] for row in each}) > 1:
            reason = differences([json.loads(text) for text in self._wire.texts(json.dumps(said))])
            raise ParallelError(
                f"every process must run the same program on the same problem, but {reason}."
            )
        self._refuse(values)

    def check_equal(self, name: str, values: Tree) -> None:
        """Refuse values that are not the same on every process, bit by bit."""
        each = [row[0] for row in self._wire.numbers(checksum(values))]
        if len({*each}) > 1:
            self._refuse({name: values})

    def _refuse(self, values: dict[str, Tree]) -> None:
        leaves = {
            label: f"{checksum(leaf):08x}"
            for name, value in values.items()
            for label, leaf in zip(tree.leaf_names(value, name), tree.leaves_of(value), strict=True)
        }
        each = [json.loads(text) for text in self._wire.texts(json.dumps(leaves))]
        raise ParallelError(
            "every process must hold the same values, but by their checksums "
            f"{differences(each)}. Seed alike before values are drawn (torch.manual_seed), or send "
            "those of one process to all (torch.distributed.broadcast); data that differ go into "
            "the batches."
        )

    def splits(self, batch: Any, name: str, *, samples: bool = True) -> bool:
        """Whether a batch is that of all processes, so that each takes its part.

        Args:
            batch: what this process was given.
            name: of it.
            samples: whether a part is some of its samples, which it then must have.

        Returns:
            The answer, the same on every process.

        Raises:
            ArgumentError: if the parts of the processes differ in their number of samples.
            ParallelError: if they are not of one kind.
        """
        divides = has_samples(batch) or not samples
        if self.split is None and (opaque := unread(batch)) and divides:
            raise ArgumentError(
                f"whether {name} is the same on every process cannot be told of a {opaque}: pass "
                "Replicas(split=True) if it is, and False if it is the part of this process."
            )
        own = kinds(batch, name)
        kind = zlib.crc32(json.dumps(own).encode())
        each = self._wire.numbers(kind, checksum(batch) if self.split is not False else 0)
        if len({row[0] for row in each}) > 1:
            told = [json.loads(text) for text in self._wire.texts(json.dumps(own))]
            if parts_alike(told):
                raise ArgumentError(
                    "the parts of a batch must have as many samples on each process, since the "
                    f"mean is over the processes, but {differences(told)}: {ADVICE}."
                )
            raise ParallelError(f"every process must get batches alike, but {differences(told)}.")
        same = len({row[1] for row in each}) == 1
        if self.split and not same:
            raise ParallelError(
                f"with Replicas(split=True) every process must get the same {name}, of which it "
                "takes its part, but they differ: shuffle alike, or pass split=False for parts of "
                "their own."
            )
        return same and self.split is not False and divides and self.size > 1


def decided(replicas: Replicas | None, callback: Callable[[Any], Any] | None) -> Any:
    """A callback that ends the loop of all processes where it ends that of one."""
    if replicas is None or callback is None:
        return callback
    return lambda progress: replicas.any(callback(progress))


def together(method: Callable[P, R]) -> Callable[P, R]:
    """A method of a solver, on all processes of its `replicas`, if it has any."""

    @functools.wraps(method)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        solver: Any = arguments[0]
        replicas = solver.replicas
        if replicas is None:
            return method(*arguments, **options)
        bound = signature(method).bind(*arguments, **options)
        call = {
            f"{method.__name__}({name}=)": x
            for name, x in bound.arguments.items()
            if name not in OF_EACH
        }
        with replicas.session():
            replicas.begin(call, {})
            with replicas.keeping(bound.arguments.get("keep")) as keep:
                if keep is not None:
                    bound.arguments["keep"] = keep
                found = method(*bound.args, **bound.kwargs)
            for name in ("control", "gradient"):
                if hasattr(found, name):
                    replicas.check_equal(name, getattr(found, name))
            return found

    return run


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    """The real dtype in which a mean of values is taken."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return torch.promote_types(real, torch.float32)


def _flat(value: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of a tensor as a real vector."""
    if value is None:
        n = like.numel() * (2 if like.is_complex() else 1)
        return torch.zeros(n, dtype=dtype, device=like.device)
    dense = value.detach().resolve_conj().resolve_neg()
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return real.reshape(-1).to(dtype)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """The tensor of these entries, with memory of its own."""
    if like.is_complex():
        pairs = flat.to(like.dtype.to_real()).reshape(*like.shape, 2).clone()
        return torch.view_as_complex(pairs)
    return flat.to(like.dtype).reshape(like.shape).clone()
