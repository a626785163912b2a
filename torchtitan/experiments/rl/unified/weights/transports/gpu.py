# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights in a GPU's memory, and what vLLM's weight-transfer engines take for a model.

Left to themselves those engines load tensor by tensor into the model. Here they carry a version as one tensor of bytes,
which the receiver looks at before the model changes.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What the engines call the one tensor.
TENSOR = "policy"


class GpuSegment:
    """Memory of this process's GPU.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.location = f"gpu:{os.getpid()}:{self.buffer.data_ptr():x}"

    def close(self) -> None:
        """Gives the memory back once nobody uses it."""
        self.buffer = torch.empty(0, dtype=torch.uint8)


class GpuHandle(ABC):
    """How a receiver comes by a version that is in a GPU's memory."""

    @abstractmethod
    def open(self, vllm_config: "VllmConfig", device: torch.device) -> torch.Tensor:
        """The bytes (uint8), on `device`.

        Args:
            vllm_config: the engine's.
            device: this process's GPU.

        Raises:
            RuntimeError, ValueError: they cannot be had.
        """


class ByteTensorSink:
    """In the model's place at vLLM's engine: keeps what comes."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.tensors = dict(weights)

    def take(self) -> torch.Tensor:
        """What came last, which is then not kept."""
        return self.tensors.pop(TENSOR)
