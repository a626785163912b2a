# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Where an engine's process keeps the policy's weights, so that what arrived there can be read back and proven."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor, DTensor
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.weights.checksum import checksum
from torchtitan.experiments.rl.unified.weights.receiver import ReceivedWeights


@dataclass(frozen=True)
class Placement:
    """This rank's part of one of the policy's tensors.

    Attributes:
        local: the engine's own memory, perhaps a slice of a fused parameter.
        shape: of the full tensor.
        offsets: where `local` begins in it, for each dimension.
    """

    local: torch.Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether this rank has all of it."""
        return tuple(self.local.shape) == self.shape

    def part_of(self, full: torch.Tensor) -> torch.Tensor:
        """What `local` should equal, a view of `full`."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.local.shape, strict=True)):
            full = full.narrow(dim, offset, size)
        return full


def not_placed(model: nn.Module, placements: Mapping[str, Placement]) -> list[str]:
    """Parameters of `model` that hold no placement's memory: a weight update would not reach them."""
    reached = {placement.local.untyped_storage().data_ptr() for placement in placements.values()}
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, param in named if _local(param).untyped_storage().data_ptr() not in reached]


def check_arrived(placements: Mapping[str, Placement], weights: ReceivedWeights) -> bool:
    """Reads the engine's memory back after an update: it must hold the bytes, whatever the copy believes.

    Args:
        placements: of the engine's model.
        weights: what it was given.

    Returns:
        Whether any of it is the sender's memory itself.

    Raises:
        WeightTransferError: names the tensor that the engine does not hold.
    """
    in_place = False
    for entry in weights.update.entries:
        name = entry.spec.name
        placement, full = placements[name], weights[name]
        if placement.whole and placement.local.data_ptr() == full.data_ptr() and placement.local.is_contiguous():
            in_place = True  # `receive` has read these bytes.
            continue
        expected = entry.checksum if placement.whole else checksum(placement.part_of(full))
        if checksum(placement.local) != expected:
            raise WeightTransferError(
                f"weights of version {weights.update.version}: the engine does not hold {name} after the update; its "
                "weights are a mix of versions, start it again"
            )
    return in_place


def _local(param: torch.Tensor) -> torch.Tensor:
    return param.to_local() if hasattr(param, "to_local") else param


# Of memory that torch allocates on a CPU, in bytes.
_ALIGNMENT = 64


@torch.no_grad()
def full_to_param(full: torch.Tensor, param: nn.Parameter, lasting: bool = False) -> None:
    """Brings `full`, the same on every rank, to `param` or this rank's shard of it, without messages.

    Args:
        full: contiguous.
        param: is written in place; or, on a CPU, becomes a view of `full`.
        lasting: `full` stays as it is while `param` is used.
    """
    if isinstance(param, DTensor):
        full = full.to(param.device)
        full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    elif lasting and param.device == full.device == torch.device("cpu") and param.dtype == full.dtype:
        # A kernel may add in another order where memory is not aligned as torch's own.
        if full.data_ptr() % _ALIGNMENT == 0:
            param.data = full
            return
    param.copy_(full)
