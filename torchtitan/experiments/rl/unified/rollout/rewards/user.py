# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A reward of the user's, in a process of its own.

A thread cannot be stopped, and one that holds the interpreter's lock (a regular expression gone exponential, say)
cannot even be waited for. A process can be ended, and the run then says which reward hung on which sample.
"""

import faulthandler
import importlib
import math
import numbers
import os
import subprocess
import sys
import threading
import traceback
import weakref
from multiprocessing import connection

from torchtitan.experiments.rl.unified.rollout.rewards.base import Reward, RewardInput

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
            self._connection.send((sample, self.timeout_seconds))
            return self._receive(self.timeout_seconds + GRACE_SECONDS, f"it took more than {self.timeout_seconds} s")

    def close(self) -> None:
        """Ends the process. A later call starts it again."""
        self._end()

    def _start(self) -> None:
        self._connection, theirs = connection.Pipe()
        with theirs:
            command = f"import {__name__} as user; user.serve({theirs.fileno()})"
            process = subprocess.Popen([sys.executable, "-c", command], pass_fds=[theirs.fileno()])
        self._end = weakref.finalize(self, _end, self._connection, process)
        self._connection.send((sys.path, self.path))
        self._receive(START_SECONDS, f"importing it took more than {START_SECONDS} s")

    def _receive(self, timeout_seconds: float, overdue: str) -> float:
        try:
            if not self._connection.poll(timeout_seconds):
                raise EOFError
            error, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._end()
            raise ValueError(f"{overdue}, or it ended its process (its last words are on standard error)") from None
        if error is not None:
            raise ValueError(error)
        return value


def serve(descriptor: int) -> None:
    """The process's side: answers (error, value) to each sample until the other side is gone."""
    parent = connection.Connection(descriptor)
    sys.path[:], path = parent.recv()
    try:
        function = _load(path)
    except BaseException as error:
        parent.send((f"reward {path!r} cannot be used: {_describe(error)}", None))
        return
    parent.send((None, 0.0))
    while True:
        try:
            sample, timeout_seconds = parent.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout_seconds, exit=True)
        reply = _evaluate(function, sample)
        faulthandler.cancel_dump_traceback_later()
        parent.send(reply)


def _load(path: str) -> Reward:
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is {type(function).__name__}, not a function")
    return function


def _evaluate(function: Reward, sample: RewardInput) -> tuple[str | None, float | None]:
    try:
        value = function(sample)
    except BaseException as error:
        return f"{_describe(error)}\n{''.join(traceback.format_tb(error.__traceback__)[1:])}", None
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        return f"it returned {value!r:.200}, which is not a finite number", None
    return None, float(value)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _end(parent: connection.Connection, process: subprocess.Popen) -> None:
    parent.close()
    process.kill()
    process.wait()
