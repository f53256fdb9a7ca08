"""Reads files from strangers, thousands of them: none may end, stop or fill the program.

Every file is drawn from its number: a small valid file of one of the kinds that the applications
read, with bytes and words changed, or one that was made up to do harm. It is read in a process of
its own pool, with an address space of 3 GiB. What may come of it: it is refused in one line that
names it, or it is accepted and its numbers are sound; one that is made up must be refused.

`python -m benchmarks.fuzz --files 10000 --first 0 --workers 2`
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from benchmarks.hostile.invented import invent
from benchmarks.hostile.judged import ACCEPTED, REFUSED, WrongError, judged
from benchmarks.hostile.spoiled import spoil
from benchmarks.hostile.valid import KINDS

_SPACE = 3 * 2**30  # bytes of addresses of a process, of which it has 0.8 GiB before it reads
_SECONDS = 2.0  # of the processor, that a file may take
_PATIENCE = 120.0  # seconds on the clock, after which a process is ended
_INVENTED = 0.25  # share of the files


def one_file(number: int, folder: Path) -> tuple[str, str, str]:
    """Makes a file and reads it.

    Args:
        number: decides what it is.
        folder: for it.

    Returns:
        Its kind; whether it was spoiled or invented; and what became of it.
    """
    rng = np.random.default_rng(number)
    kind = list(KINDS)[number % len(KINDS)]
    made_up = rng.random() < _INVENTED
    harmless = True
    if made_up:
        path, harmless = invent(kind, folder, rng)
    else:
        path = KINDS[kind](folder, rng)
        spoil(folder, path, rng)
    begun = time.process_time()
    try:
        outcome = judged(kind, path)
        if outcome == ACCEPTED and not harmless:
            outcome = "wrong: made up, and accepted"
    except WrongError as error:
        outcome = f"wrong: {error}"
    except MemoryError:
        outcome = "memory"
    except BaseException:
        outcome = f"traceback: {traceback.format_exc(limit=-4)}"
    spent = time.process_time() - begun
    if spent > _SECONDS:
        outcome = f"slow: {spent:.1f} s, {outcome}"
    return kind, "invented" if made_up else "spoiled", outcome


def _work(numbers: range, out: Connection, place: Path) -> None:
    """Reads files in this process and tells of each."""
    resource.setrlimit(resource.RLIMIT_AS, (_SPACE, _SPACE))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  until the process ends
    for number in numbers:
        folder = place / str(number) / "files"
        folder.mkdir(parents=True)
        out.send(("begun", number, None))
        out.send(("done", number, one_file(number, folder)))
        shutil.rmtree(place / str(number), ignore_errors=True)
    out.send(("end", 0, None))


class Worker:
    """A process that reads a range of files, replaced when one of them ends or stops it."""

    def __init__(self, numbers: range, place: Path) -> None:
        self.numbers, self.place = numbers, place
        self.ended = not numbers
        self.at = numbers.start
        if numbers:
            self._begin()

    def _begin(self) -> None:
        self.own, theirs = multiprocessing.Pipe(duplex=False)
        rest = range(self.at, self.numbers.stop, self.numbers.step)
        self.process = multiprocessing.Process(target=_work, args=(rest, theirs, self.place))
        self.process.start()
        theirs.close()
        self.told = time.monotonic()

    def outcomes(self) -> list[tuple[int, tuple[str, str, str]]]:
        """What it told since it was asked last."""
        found = []
        try:
            while self.own.poll():
                what, number, outcome = self.own.recv()
                self.told = time.monotonic()
                if what == "begun":
                    self.at = number
                elif what == "done":
                    found.append((number, outcome))
                    self.at = number + self.numbers.step
                else:
                    self.ended = True
                    self.process.join()
                    return found
        except EOFError:  # the process is gone
            self.process.join()
            found.append((self.at, self._lost(f"crash: exit code {self.process.exitcode}")))
            return found
        if time.monotonic() - self.told > _PATIENCE:
            os.kill(self.process.pid or 0, signal.SIGKILL)
            self.process.join()
            found.append((self.at, self._lost("hang")))
        return found

    def _lost(self, what: str) -> tuple[str, str, str]:
        kind = list(KINDS)[self.at % len(KINDS)]
        self.at += self.numbers.step
        self.ended = self.at >= self.numbers.stop
        if not self.ended:
            self._begin()
        return kind, "?", what


def run(first: int, files: int, workers: int) -> tuple[Counter[tuple[str, str, str]], list[dict]]:
    """Reads files.

    Args:
        first: number of the first.
        files: how many.
        workers: processes.

    Returns:
        Counts by kind, way and outcome, and what went wrong.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        each = [
            Worker(range(first + k, first + files, workers), Path(name)) for k in range(workers)
        ]
        while any(not one.ended for one in each):
            for one in each:
                for number, (kind, way, outcome) in [] if one.ended else one.outcomes():
                    counts[kind, way, outcome.partition(":")[0]] += 1
                    if outcome not in {ACCEPTED, REFUSED}:
                        print(f"{number} {kind}: {outcome}", flush=True)
                        wrong.append({"number": number, "kind": kind, "outcome": outcome})
            time.sleep(0.02)
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="JSON of the counts.")
    given = parser.parse_args()
    begun = time.monotonic()
    counts, wrong = run(given.first, given.files, given.workers)
    outcomes = sorted({outcome for _, _, outcome in counts})
    print("| kind |", " | ".join(outcomes), "|")
    print("|---" * (len(outcomes) + 1) + "|")
    for kind in KINDS:
        row = [
            sum(n for (k, _, o), n in counts.items() if (k, o) == (kind, one)) for one in outcomes
        ]
        print(f"| {kind} |", " | ".join(map(str, row)), "|")
    total = [sum(n for (_, _, o), n in counts.items() if o == one) for one in outcomes]
    print("| all |", " | ".join(map(str, total)), "|")
    print(f"{sum(total)} files in {time.monotonic() - begun:.0f} s")
    if given.out is not None:
        plain = [[*key, n] for key, n in sorted(counts.items())]
        given.out.write_text(json.dumps({"counts": plain, "wrong": wrong}, indent=1))


if __name__ == "__main__":
    main()
