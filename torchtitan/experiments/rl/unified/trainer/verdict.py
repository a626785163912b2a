# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Errors of one rank: all ranks agree on them, or the controller hears, before anyone waits for the one that failed."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.experiments.rl.unified import errors
from torchtitan.experiments.rl.unified.errors import ProcessLost, TrainerFailed

# How gloo and NCCL say that the process at the other end is not there any more.
_PEER_GONE = re.compile(r"gloo.*(by peer|Broken pipe|Timed out)|remote process exited", re.DOTALL)


class Verdict:
    """What the ranks of a trainer agree on before one of them raises. Built on all of them at once."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """All ranks leave its block together: with the error of the lowest rank that failed in it, if one did.

        The block must not wait for another rank: that one could be here already.
        """
        error = None
        try:
            yield
        except Exception as failure:
            error = failure
        rank, ranks = dist.get_rank(), dist.get_world_size()
        lowest = torch.tensor(ranks if error is None else rank)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._group)
        if lowest == ranks:
            return
        told: list[Any] = [error_to_tell(error, rank) if error is not None else None]
        dist.broadcast_object_list(told, src=int(lowest), group=self._group)
        raise told[0] from error


def error_to_tell(error: BaseException, rank: int) -> Exception:
    """What another process is told of `error`, which rank `rank` of the trainer failed with.

    This package's own errors and ValueError speak for themselves. What is left of a collective whose other end has
    gone is a ProcessLost; anything else becomes a TrainerFailed with the error's class, text and place.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and _PEER_GONE.search(text):
        return ProcessLost(f"rank {rank} of the trainer lost another: {text.strip().split('. ')[0]}")
    if type(error) is ValueError or type(error).__module__ == errors.__name__:
        return type(error)(text)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno} in {place.name}"
    return TrainerFailed(f"rank {rank} of the trainer failed: {type(error).__name__}: {text} ({where})")
