# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A reward of the user's, in a process of its own.

A thread cannot be stopped, and one that holds the interpreter's lock (a regular expression gone exponential, say)
cannot even be waited for. A process can be ended, and the run then says which reward hung on which sample.
"""

import os
import subprocess
import sys
import threading
import weakref
from multiprocessing import connection
from pathlib import Path

from torchtitan.experiments.rl.unified.rollout.rewards.base import RewardInput

# The function's module may import heavy libraries.
START_SECONDS = 120.0
# The process reports a hang itself, with its stack; this much later it is killed.
GRACE_SECONDS = 2.0


class UserReward:
    """The function at a dotted path, called in a process of its own, started at once and again after a hang.

    Args:
        path: "package.module:function" or "package.module.function", importable from here.
        timeout_seconds: longest time for one sample.

    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, path: str, timeout_seconds: float) -> None:
        self.path = path
        self.timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._start()

    def __call__(self, sample: RewardInput) -> float:
        """The function's value for `sample`.

        Raises:
            ValueError: the function raised, returned no finite number, took too long or ended its process.
        """
        with self._lock:
            if self._connection.closed:
                self._start()
            overdue = f"it took more than {self.timeout_seconds} s"
            return self._ask((vars(sample), self.timeout_seconds), self.timeout_seconds + GRACE_SECONDS, overdue)

    def close(self) -> None:
        """Ends the process. A later call starts it again."""
        self._end()

    def _start(self) -> None:
        self._connection, theirs = connection.Pipe()
        with theirs:
            command = [sys.executable, str(Path(__file__).with_name("user_process.py")), str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._end = weakref.finalize(self, _end, self._connection, process)
        # The working directory is where people put a module of their own; a command's sys.path need not have it.
        self._ask(
            ([*sys.path, os.getcwd()], self.path),
            START_SECONDS,
            f"importing {self.path!r} took more than {START_SECONDS} s",
        )

    def _ask(self, message: tuple, limit_seconds: float, overdue: str) -> float:
        try:
            self._connection.send(message)
            if not self._connection.poll(limit_seconds):
                raise EOFError
            error, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._end()
            raise ValueError(f"{overdue}, or it ended its process (its last words are on standard error)") from None
        if error is not None:
            raise ValueError(error)
        return value


def _end(parent: connection.Connection, process: subprocess.Popen) -> None:
    parent.close()
    process.kill()
    process.wait()
