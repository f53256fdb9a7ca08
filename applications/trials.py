"""Work in a process of its own first: what ends or stops it there does not end the program.

Libraries in C may crash or loop for ever over a damaged file, and nothing in Python can stop them.
"""

import faulthandler
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable

POSSIBLE = sys.platform == "linux"  # elsewhere forks of large programs are not safe
_WAIT = 0.002  # seconds between looks at the process
_PATIENCE = 60.0  # seconds on the clock; a busy machine gives little of its processor


def survives(work: Callable[[], object], seconds: int) -> str | None:
    """Does work in a copy of this process, without its results.

    Args:
        work: may read files, must not use torch or threads; errors that it raises do not count.
        seconds: of the processor that it may take.

    Returns:
        None if it came to its end, or an error of its own; else what happened.
    """
    if not POSSIBLE:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which is used
        process = os.fork()
    if process == 0:
        _alone(work, seconds)
    begun = time.monotonic()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - begun > _PATIENCE:
            os.kill(process, signal.SIGKILL)
        time.sleep(_WAIT)
    if not os.WIFSIGNALED(status):
        return None
    late = os.WTERMSIG(status) in {signal.SIGXCPU, signal.SIGKILL}
    return f"no end within {seconds} s" if late else "a crash"


def _alone(work: Callable[[], object], seconds: int) -> None:
    """The copy of the process; it ends here."""
    try:
        faulthandler.disable()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        work()
    finally:
        os._exit(0)
