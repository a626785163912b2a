# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What an engine or the trainer raises reaches the controller, whatever class it is of."""

import json
import subprocess
import sys

import pytest
from torchtitan.experiments.rl.unified import errors

# The real actor and the real controller's side of it, in two processes; the engine is what raises.
SCRIPT = """
import asyncio, json, os, pickle, socket, subprocess, sys, threading
import monarch.actor
from monarch.actor import endpoint, this_host
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.controller.calls import answer
from torchtitan.experiments.rl.unified.generator import actor


class Locked(Exception):
    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()

class Demanding(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

class Mute(Exception):
    def __str__(self):
        raise OSError("no words")

class Local(Exception):
    def __reduce__(self):
        return os.getpid, ("no", "such", "call")

class NotEvenAnException(BaseException):
    pass

def validation():
    from pydantic import BaseModel
    class Model(BaseModel):
        number: int
    Model(number="none")

def argument():
    from pydantic import validate_call
    from pydantic_core import ArgsKwargs
    error = TypeError("cannot serve this")
    error.args = ("cannot serve this", ArgsKwargs((lambda: 0,)))
    raise error

def out_of_memory():
    import torch
    raise torch.OutOfMemoryError("tried to allocate 80 GiB")

def refused():
    from vllm.exceptions import VLLMValidationError
    raise VLLMValidationError("temperature must be in [0, 2]", parameter="temperature", value=3)

def dcp():
    from torch.distributed.checkpoint.api import CheckpointException
    raise CheckpointException("read", {0: (ValueError("shard 3"), [])})

def throw(error):
    raise error

RAISING = {
    "pydantic": validation, "unpicklable args": argument, "torch": out_of_memory, "vllm": refused, "dcp": dcp,
    "lock": lambda: throw(Locked("held")), "two arguments": lambda: throw(Demanding("this", "that")),
    "mute": lambda: throw(Mute()), "does not unpickle": lambda: throw(Local("local")),
    "base": lambda: throw(NotEvenAnException("base")), "exit": lambda: sys.exit(3), "key": lambda: {}["missing"],
    "index": lambda: [][7], "attribute": lambda: None.engine, "division": lambda: 1 / 0, "os": lambda: open("/no/such"),
    "process": lambda: subprocess.run(["false"], check=True), "unicode": lambda: b"\\xff".decode(),
    "timeout": lambda: throw(TimeoutError("the engine's ranks")),
    "socket": lambda: socket.create_connection(("127.0.0.1", 1)), "assertion": lambda: throw(AssertionError()),
    "group": lambda: throw(ExceptionGroup("several", [Locked("one"), KeyError("two")])),
    "plain": lambda: throw(ValueError("max_model_len 9 is too small")), "import": lambda: __import__("no_such_module"),
    "own": lambda: throw(__import__(actor.__name__.replace("generator.actor", "errors"), fromlist=["x"])
                         .WeightTransferError("weights of version 3: w2 arrived damaged")),
}


class Engine:
    def __init__(self, config):
        if self.start_raises:
            self.start_raises()

    def generate(self, name):
        RAISING[name]()

    def update_weights(self, name):
        RAISING[name]()


class Raising(actor.GeneratorActor):
    @endpoint
    def at_start(self, name: str) -> None:
        Engine.start_raises = staticmethod(RAISING[name]) if name in RAISING else None
        actor.Generator = Engine


async def main():
    monarch.actor.unhandled_fault_hook = lambda failure: None
    procs = this_host().spawn_procs(per_host={"ranks": 1}, name="engine")
    engine = procs.spawn("engine", Raising, load_job_config([]), 0)
    found = {}

    async def hear(place, name, future):
        try:
            await answer(future, 60, "an answer")
        except Exception as error:
            assert not error.__dict__ and error.args == (str(error),), vars(error)
            found[f"{place}: {name}"] = [type(error).__name__, str(error)]

    for name in RAISING:
        await engine.at_start.call_one(name)
        await hear("start", name, engine.setup.call_one())
    await engine.at_start.call_one("nothing")
    await engine.setup.call_one()
    for name in RAISING:
        await hear("generate", name, engine.generate.call_one(name))
        await hear("update", name, engine.update_weights.call_one(name))
    print(json.dumps(found), flush=True)
    await procs.stop()


prepare_environment()
asyncio.run(main())
"""

FAILED = {
    "unpicklable args": "TypeError: ('cannot serve this', ",
    "torch": "OutOfMemoryError: tried to allocate 80 GiB",
    "timeout": "TimeoutError: the engine's ranks",
    "dcp": "CheckpointException: CheckpointException",
    "lock": "Locked: held",
    "two arguments": "Demanding: this and that",
    "mute": "Mute: no message, its __str__ raised OSError",
    "does not unpickle": "Local: local",
    "base": "NotEvenAnException: base",
    "exit": "SystemExit: 3",
    "key": "KeyError: 'missing'",
    "index": "IndexError: list index out of range",
    "attribute": "AttributeError: 'NoneType' object has no attribute 'engine'",
    "division": "ZeroDivisionError: division by zero",
    "os": "FileNotFoundError: [Errno 2] No such file or directory: '/no/such'",
    "process": "CalledProcessError: Command '['false']' returned non-zero exit status 1.",
    "socket": "ConnectionRefusedError: [Errno 111] Connection refused",
    "assertion": "AssertionError\n",
    "group": "ExceptionGroup: several (2 sub-exceptions)",
    "import": "ModuleNotFoundError: No module named 'no_such_module'",
}
REFUSED = {
    "vllm": "VLLMValidationError: temperature must be in [0, 2]",
    "pydantic": "ValidationError: 1 validation error for Model\nnumber\n",
    "unicode": "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff",
    "plain": "max_model_len 9 is too small",
}


@pytest.mark.slow
def test_whatever_an_engine_raises_is_read_as_class_and_message():
    """Proves it with Monarch's own pickling: at start, at generate and at update, each class in turn on one actor."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(FAILED) == 20
    for place in ("start", "generate", "update"):
        for cases, crossing in ((FAILED, "ActorFailed"), (REFUSED, "ValueError")):
            for name, beginning in cases.items():
                cls, message = found.pop(f"{place}: {name}")
                assert cls == crossing and message.startswith(beginning), (place, name, cls, message)
                # The last lines of its traceback, innermost last: where it came from.
                assert name == "plain" or message.splitlines()[-1].startswith("  at "), message
        cls, message = found.pop(f"{place}: own")
        assert (cls, message) == ("WeightTransferError", "weights of version 3: w2 arrived damaged")
    assert found == {}


def test_an_error_of_this_project_keeps_its_class():
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, Exception):
            crossing = errors.as_text(cls(f"{name} here"))
            assert type(crossing) is cls and str(crossing) == f"{name} here"
