# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What every weight transport has in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torchtitan.experiments.rl.unified.messages import TensorSpec, WeightUpdate


@dataclass(frozen=True)
class PolicyWeights:
    """The weights of a policy on their way out.

    Attributes:
        specs: every tensor, as it shall arrive, in the order of the stream.
        stream: yields each tensor whole, under its name, on any device and in any dtype; consumed once.
    """

    specs: list[TensorSpec]
    stream: Iterable[tuple[str, torch.Tensor]]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, in the dtype it shall arrive in."""
        for spec, (name, tensor) in zip(self.specs, self.stream, strict=True):
            yield name, tensor.to(spec.dtype)


class WeightTransport(ABC):
    """Carries versions of the weights from a sender to any number of receivers.

    The sender calls `send`. Each generator calls `fetch`, and every process of its engine reads what that
    returns with a `Receiver`. The last `slots` versions that were sent stay fetchable.
    """

    @abstractmethod
    def send(self, version: int, weights: PolicyWeights) -> WeightUpdate:
        """Makes `weights` fetchable as `version`; they are taken from their stream one by one."""

    def fetch(self, update: WeightUpdate) -> WeightUpdate:
        """Brings the bytes of `update` within reach of this host's processes and says where they are.

        Raises:
            WeightTransferError: they cannot be had.
        """
        return update

    @abstractmethod
    def close(self) -> None:
        """Frees what this end holds; what it sent cannot be received any more."""
