"""Files that either are complete or do not appear."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from applications.mri.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, renamed into place when all is written.

    Args:
        path: the file in the end, replaced if it exists.

    Yields:
        Where to write.

    Raises:
        InputError: if the file cannot be written; whatever goes wrong, nothing of it is left.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: the folder cannot be written ({error}); choose another."
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner reads
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(
                f"{path}: the file cannot be written ({error}); choose another."
            ) from error
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Writes `content` as a `whole_file`.

    Args:
        path: the file, replaced if it exists.
        content: all of it.

    Raises:
        InputError: if the file cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
