# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights that are not the model's at the moment: the frozen policy of a KL penalty, and the policy's last versions."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class KeptWeights:
    """A copy of a model's weights as they are now, shard for shard, to be put in their place for a while.

    The model itself computes with them, so what comes out is of the same arithmetic in every layout. It costs one copy
    of this rank's shards and no second model.

    Args:
        model: parallelized, its weights loaded.
        device: where the copy lies; None: beside the weights.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self._model = model
        self._weights = [_local(param).to(device, copy=True) for param in model.parameters()]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has these weights; not between a forward and its backward."""
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
            other, self._weights[i] = self._weights[i], weight.to(self._weights[i].device, copy=True)
            weight.copy_(other)


class PastVersions:
    """The policy's last versions, in host memory, so that what they sampled can be computed again under them.

    A run that goes on from a checkpoint begins without any.

    Args:
        model: parallelized.
        count: versions kept besides the model's own.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self._model, self._count = model, count
        self._versions: dict[int, KeptWeights] = {}

    def __contains__(self, version: int) -> bool:
        return version in self._versions

    def in_place(self, version: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the weights of `version`, which is kept."""
        return self._versions[version].in_place()

    def keep(self, version: int) -> None:
        """Keeps the model's weights, which are those of `version`; forgets those that are `count` versions older."""
        self._versions = {v: weights for v, weights in self._versions.items() if v > version - self._count}
        if self._count:
            self._versions[version] = KeptWeights(self._model, torch.device("cpu"))


def _local(param: nn.Parameter) -> torch.Tensor:
    weight = param.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight
