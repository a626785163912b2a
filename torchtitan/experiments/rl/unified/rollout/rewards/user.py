# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A reward in a process of its own: a user's, or one of this package's that asks a library for more than it can do.

A thread cannot be stopped, and one that holds the interpreter's lock (a regular expression gone exponential, say)
cannot even be waited for. A process can be ended, and the run then says which reward hung on which sample.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path

from torchtitan.experiments.rl.unified.rollout.rewards.base import RewardInput

# The function's module may import heavy libraries.
START_SECONDS = 120.0
# The process reports a hang itself, with its stack; this much later it is killed.
GRACE_SECONDS = 2.0


class ProcessEnded(ValueError):
    """The process of a reward took too long, or ended, over a sample."""


class RewardProcess:
    """A function called in a process of its own, started at once, and again after a hang.

    Args:
        path: "package.module:function" or "package.module.function", importable from here; or a file that has a
            `make()`, which returns the function.
        timeout_seconds: longest time for one sample.
        quiet: keep what it writes to standard error, such as the stack of a hang, to itself.
    """

    def __init__(self, path: str, timeout_seconds: float, quiet: bool = False) -> None:
        self.path = path
        self.timeout_seconds = timeout_seconds
        self.quiet = quiet
        self._lock = threading.Lock()
        self._start()

    def __call__(self, samples: Sequence[RewardInput]) -> Iterator[float]:
        """The function's values for `samples`, one after the other; raises what `value` does."""
        return map(self.value, samples)

    def value(self, sample: RewardInput) -> float:
        """The function's value for `sample`.

        Raises:
            ProcessEnded: the function took too long or ended its process.
            ValueError: it raised or returned no number, or there is no such function.
        """
        with self._lock:
            self._wait()
            try:
                self._connection.send((vars(sample), self.timeout_seconds))
            except ConnectionError:
                pass  # It ended since: what is left of its words, if anything, is read below.
            limit = self.timeout_seconds + GRACE_SECONDS
            return self._receive(limit, f"it took more than {self.timeout_seconds} s")

    def wait(self) -> None:
        """Returns when the process is ready to be called. Raises ValueError if there is no such function."""
        with self._lock:
            self._wait()

    def restart(self) -> None:
        """Starts the process again if it has ended, without waiting for it."""
        with self._lock:
            if self._connection.closed:
                self._start()

    def close(self) -> None:
        """Ends the process. A later call starts it again."""
        self._end()

    def _start(self) -> None:
        self._connection, theirs = connection.Pipe()
        with theirs:
            command = [sys.executable, str(Path(__file__).with_name("user_process.py")), str(theirs.fileno())]
            errors = subprocess.DEVNULL if self.quiet else None
            # A group of its own, which what the function starts belongs to.
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=errors, process_group=0)
        self._end = weakref.finalize(self, _end, self._connection, self._process)
        # The working directory is where people put a module of their own; a command's sys.path need not have it.
        self._connection.send(([*sys.path, os.getcwd()], self.path))
        self._ready = False

    def _wait(self) -> None:
        if self._connection.closed:
            self._start()
        if not self._ready:
            try:
                self._receive(START_SECONDS, f"importing {self.path!r} took more than {START_SECONDS} s")
            except ProcessEnded as error:
                raise ValueError(str(error)) from None
            self._ready = True

    def _receive(self, limit_seconds: float, overdue: str) -> float:
        begun = time.monotonic()
        try:
            if not self._connection.poll(limit_seconds):
                raise EOFError
            error, value = self._connection.recv()
        except (EOFError, ConnectionError):
            in_time = time.monotonic() - begun < limit_seconds - GRACE_SECONDS
            what = f"it ended its process, {self._status()}" if in_time else overdue
            self._end()
            raise ProcessEnded(what if self.quiet else f"{what} (its last words are on standard error)") from None
        if error is not None:
            raise ValueError(error)
        return value

    def _status(self) -> str:
        """How a process whose pipe is closed ended."""
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(GRACE_SECONDS)
            return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return "or closed its pipe"


def _end(parent: connection.Connection, process: subprocess.Popen) -> None:
    parent.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
