"""Peak live bytes and paired times, measured inside one process."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd.profiler import profile

MIB = 2**20


def peak_live_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensor memory alive at once during `run`, beyond those alive before.

    Counted from the allocator's own record of every allocation and release, not from the resident
    set of the process, which keeps what the allocator has not given back to the system.
    """
    run()
    with profile(profile_memory=True) as recorded:
        kept = run()
    del kept
    events = recorded.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def paired_times(
    runs: Sequence[Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Times of `runs`, taken in turn, so that a drift of the machine meets all alike.

    `clock` may be `time.process_time`: what runs beside then counts less.
    """
    found: list[list[float]] = [[] for _ in runs]
    for i in range(repeats + warm_up):
        for run, seconds in zip(runs, found, strict=True):
            began = clock()
            run()
            if i >= warm_up:
                seconds.append(clock() - began)
    return [Timing(tuple(seconds)) for seconds in found]


def median_ratio(a: Timing, b: Timing) -> float:
    """Median over the pairs of a / b."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def machine() -> str:
    """Processor, threads, versions and commit, for the head of a table."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return json.dumps(
        {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
        }
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(rows: Sequence[dict[str, object]]) -> None:
    """Print records as a table; numbers with three digits."""
    heads = list(rows[0])
    cells = [heads] + [[_text(row[head]) for head in heads] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    for row in cells:
        first = row[0].ljust(widths[0])
        print("  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    print()


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(path: str | None, found: dict[str, object]) -> None:
    """Write `found` and the machine as JSON, if a path was given."""
    if path:
        text = json.dumps({"machine": json.loads(machine()), **found}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")
