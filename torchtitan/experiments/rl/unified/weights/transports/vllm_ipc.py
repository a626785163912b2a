# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights through the memory of a GPU that trainer and generators share, by vLLM's IPC weight-transfer engine."""

import functools
from dataclasses import dataclass, replace
from typing import Any, TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torchtitan.experiments.rl.unified.messages import WeightUpdate
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights, WeightTransport
from torchtitan.experiments.rl.unified.weights.transports.gpu import ByteTensorSink, GpuHandle, GpuSegment, TENSOR
from torchtitan.experiments.rl.unified.weights.transports.shared_memory import SharedMemoryTransport

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class IpcHandle(GpuHandle):
    """Maps a segment of another process: what vLLM's engine wants to know of it."""

    update_info: dict[str, Any]

    def open(self, vllm_config: "VllmConfig", device: torch.device) -> torch.Tensor:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

        shelf = ByteTensorSink()
        engine = IPCWeightTransferEngine(WeightTransferConfig(backend="ipc"), vllm_config, device, shelf)
        engine.receive_weights(engine.update_info_cls(**self.update_info))
        return shelf.take()


class IpcSegment(GpuSegment):
    """Memory that other processes can map while this one lives."""

    @functools.cached_property
    def handle(self) -> IpcHandle:
        """One export serves all receivers and versions."""
        gpu = torch.cuda.get_device_properties(self.buffer.device).uuid
        return IpcHandle(
            {
                "names": [TENSOR],
                "dtype_names": ["uint8"],
                "shapes": [[self.size]],
                "ipc_handles": [{str(gpu): reduce_tensor(self.buffer)[1]}],
            }
        )


class VllmIpcTransport(WeightTransport):
    """Both ends on one GPU: nothing passes through the host's memory, checksums are taken on the GPU.

    Args:
        slots: versions that stay fetchable; each holds GPU memory of the size of the weights.
    """

    def __init__(self, slots: int = 1) -> None:
        self._memory = SharedMemoryTransport(slots, IpcSegment)

    def send(self, version: int, weights: PolicyWeights) -> WeightUpdate:
        update = self._memory.send(version, weights)
        torch.cuda.synchronize()
        return replace(update, handle=self._memory.segments[update.location].handle)

    def close(self) -> None:
        self._memory.close()
