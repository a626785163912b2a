# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Every error that crosses rooms, and how an error crosses to another process: as text."""

import functools
import traceback
from collections.abc import Callable
from typing import Any

# Of a traceback: the innermost calls.
FRAMES = 4


class ProcessLost(RuntimeError):
    """A process of the job ended, or did not answer in time."""


class TrainerLost(ProcessLost):
    """It was one of the trainer's."""


class TrainerFailed(RuntimeError):
    """A rank of the trainer raised: started again, it would do so again."""


class WeightTransferError(RuntimeError):
    """Weights did not arrive as they were sent."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; those before it are untouched."""


class NonFiniteError(RuntimeError):
    """A step's loss or gradient norm is NaN or infinite; no optimizer step was taken."""


class ParityError(RuntimeError):
    """A sampled token whose log-prob differs between generator and trainer."""


class ActorFailed(RuntimeError):
    """What a library raised in an actor, as text: class, message and the last lines of the traceback."""


# Bases of errors that refuse what was asked for: asking again would be refused again.
REFUSALS = {"ValueError", "VLLMClientError"}


def as_text(error: BaseException) -> Exception:
    """`error` as it can be sent to another process: with a message alone, of a class that every process knows.

    Returns:
        An error of the same class if that is one of this module or ValueError. Of another class, a ValueError if
        it refuses what was asked for, else ActorFailed; class, message and the last lines of the traceback are its
        message then.
    """
    cls = type(error)
    try:
        message = str(error)
    except Exception as broken:  # A library's class may fail at this as well.
        message = f"no message, its __str__ raised {type(broken).__name__}"
    if cls is ValueError or cls.__module__ == __name__:
        return cls(message)
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    calls = "".join(f"\n  at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)
    crossing = ValueError if REFUSALS & {base.__name__ for base in cls.__mro__} else ActorFailed
    return crossing(f"{cls.__qualname__}: {message}{calls}" if message else f"{cls.__qualname__}{calls}")


def crosses_as_text(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`endpoint`, whose errors come out by `as_text`: pickling a library's own may fail, on either side."""

    @functools.wraps(endpoint)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return endpoint(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # DCP's CheckpointException and SystemExit are no Exceptions.
            crossing = as_text(error)
        # Outside of the handler: nothing of the library's error hangs on to this one.
        raise crossing

    return told
