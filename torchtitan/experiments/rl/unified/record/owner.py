# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A run's folder has one job at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = "job.lock"


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes the folder if it is not there, and keeps other jobs out of it; the lock ends with this process.

    Raises:
        ValueError: another job is in it; says on which host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not _locks(file.fileno()):
            raise ValueError(_taken(folder))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_free(folder: Path) -> None:
    """Raises ValueError as `owned` does, and changes nothing."""
    try:
        with open(folder / LOCK, "r+", encoding="utf-8") as file:
            if not _locks(file.fileno()):
                raise ValueError(_taken(folder))
    except FileNotFoundError:
        pass


def _locks(descriptor: int) -> bool:
    """The open file's, and not this process's: that one ends as soon as anything here reads the file and closes it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _taken(folder: Path) -> str:
    owner = (folder / LOCK).read_text(encoding="utf-8")
    return f"{folder} is in use by {owner or 'another job'}: end that one, or give this one another --job.dump_folder"
