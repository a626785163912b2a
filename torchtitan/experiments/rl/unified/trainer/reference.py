# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The frozen policy that a KL penalty keeps the trained one near."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class ReferencePolicy:
    """A copy of a model's weights as they are now, shard for shard, to be put in their place for a while.

    The model itself computes the reference's log-probs, so they come from the same arithmetic in every layout. It costs
    one copy of this rank's shards and no second model.

    Args:
        model: parallelized, its weights loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = [_local(param).clone() for param in model.parameters()]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the reference's weights; not between a forward and its backward."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # What was gathered from the other weights must not be used.
        for i, param in enumerate(self._model.parameters()):
            weight = _local(param)
            other, self._weights[i] = self._weights[i], weight.clone()
            weight.copy_(other)


def _local(param: nn.Parameter) -> torch.Tensor:
    weight = param.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight
