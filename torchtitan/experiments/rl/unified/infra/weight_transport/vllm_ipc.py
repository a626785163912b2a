# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights through the memory of a GPU that trainer and generators share, by vLLM's IPC weight-transfer engine."""

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torchtitan.experiments.rl.unified.infra.weight_transport.base import PolicyWeights, WeightTransport, WeightUpdate
from torchtitan.experiments.rl.unified.infra.weight_transport.shared_memory import SharedMemoryTransport

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_NAME = "policy"


class GpuSegment:
    """Memory of this process's GPU that other processes can map while this one lives.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.location = f"gpu:{os.getpid()}:{self.buffer.data_ptr():x}"
        # What vLLM's engine knows of it. One export serves all receivers and versions.
        gpu = torch.cuda.get_device_properties(self.buffer.device).uuid
        self.handle = {
            "names": [_NAME],
            "dtype_names": ["uint8"],
            "shapes": [[size]],
            "ipc_handles": [{str(gpu): reduce_tensor(self.buffer)[1]}],
        }

    def close(self) -> None:
        """Gives the memory back once the last process has unmapped it."""
        self.buffer = torch.empty(0, dtype=torch.uint8)


class VllmIpcTransport(WeightTransport):
    """Both ends on one GPU: nothing passes through the host's memory, checksums are taken on the GPU.

    vLLM's engine carries a version as one tensor of bytes. Left to itself it would load tensor by tensor into the
    model; here the receiver looks at all of them before the model changes.

    Args:
        slots: versions that stay fetchable; each holds GPU memory of the size of the weights.
    """

    def __init__(self, slots: int = 1) -> None:
        self._memory = SharedMemoryTransport(slots, GpuSegment)

    def send(self, version: int, weights: PolicyWeights) -> WeightUpdate:
        update = self._memory.send(version, weights)
        torch.cuda.synchronize()
        return replace(update, handle=self._memory.segments[update.location].handle)

    def close(self) -> None:
        self._memory.close()


def open_handle(handle: dict[str, Any], vllm_config: "VllmConfig", device: torch.device) -> torch.Tensor:
    """The bytes (uint8) of a GpuSegment in another process.

    Args:
        handle: of the segment.
        vllm_config: the engine's.
        device: the GPU that both processes use.

    Raises:
        ValueError: the sender is on another GPU.
        RuntimeError: the memory cannot be mapped.
    """
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    shelf = _Shelf()
    engine = IPCWeightTransferEngine(WeightTransferConfig(backend="ipc"), vllm_config, device, shelf)
    engine.receive_weights(engine.update_info_cls(**handle))
    return shelf.tensors[_NAME]


class _Shelf:
    """In the model's place at vLLM's engine: keeps what comes."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.tensors = dict(weights)
