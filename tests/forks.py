"""Work in a process of its own, forked from this one, in which torch is loaded already."""

import os
import warnings


def forked(work, *arguments):
    """The text that `work` returns there, or that of its error."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which is used
        process = os.fork()
    if process == 0:
        try:
            os.write(writing, work(*arguments).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(process, 0)
    return text
