# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The process of a reward: reads samples from a pipe, answers each with (error, value).

Run by its path and not imported: importing anything of torchtitan imports torch, which the user's function may do
without.
"""

import faulthandler
import importlib
import inspect
import numbers
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def serve(parent: Connection) -> None:
    """Answers until the other side is gone. A sample that takes too long ends the process, its stack on stderr."""
    sys.path[:], path = parent.recv()
    process = os.getpid()
    try:
        function = _load(path)
    except BaseException as error:
        parent.send((f"reward {path!r} cannot be used: {_describe(error)}", None))
        return
    if os.getpid() != process:  # A module that forks when it is imported: only one may answer.
        os._exit(0)
    parent.send((None, 0.0))
    reward_input = runpy.run_path(str(Path(__file__).with_name("base.py")))["RewardInput"]
    while True:
        try:
            fields, timeout_seconds = parent.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout_seconds, exit=True)
        reply = _evaluate(function, reward_input(**fields))
        if os.getpid() != process:  # Likewise of a function that forks.
            os._exit(0)
        faulthandler.cancel_dump_traceback_later()
        parent.send(reply)


def _load(path: str) -> Callable[[Any], float]:
    if path.endswith(".py"):
        return runpy.run_path(path)["make"]()
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is {type(function).__name__}, not a function")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name} is async: a reward returns its number when it is called")
    try:
        signature = inspect.signature(function)
    except ValueError:  # Some that are written in C do not say what they take.
        return function
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(f"{name}{signature} cannot be called with one sample: {error}") from None
    return function


def _evaluate(function: Callable[[Any], float], sample: Any) -> tuple[str | None, float | None]:
    try:
        value = function(sample)
        if not isinstance(value, numbers.Real):
            return f"it returned {repr(value)[:200]}, which is not a number", None
        return None, float(value)
    except BaseException as error:
        return f"{_describe(error)}\n{''.join(traceback.format_tb(error.__traceback__)[1:])}", None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    if os.getpgid(0) == os.getpid():  # Whoever asked is gone: what the function has left running goes, too.
        os.killpg(0, signal.SIGKILL)
