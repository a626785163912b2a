# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a device is: all that trainer and generator must know of the hardware to compute the same bits on it.

A device is one folder (or file) of this package named as people say it (`cpu`, `cuda`); its DEVICE is all that others
touch. Methods import what they need when they are called: this module needs torch alone.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch


class Device(ABC):
    """One kind of hardware.

    Attributes:
        name: torch's device type.
        in_host_memory: models lie in the host's memory, not in a card's.
        default_config: file in train_configs/ that a job without --job.config_file runs.
        logits_at_once: elements of logits worth looking at in one go.
        tensor_parallel_vllm_compat: VLLM_COMPAT may be tensor parallel.
    """

    name: str
    in_host_memory: bool
    default_config: str
    logits_at_once: int
    tensor_parallel_vllm_compat: bool

    # Which cards there are.

    @abstractmethod
    def cards(self) -> list[str]:
        """Names of the cards that this process may use, without initialising them; [] where ranks share the host."""

    @abstractmethod
    def use_cards(self, first: int, count: int) -> None:
        """Shows this process `count` of its cards from number `first` on, in turn where there are too few.

        Call it before the process touches one.
        """

    # Arithmetic of both hosts.

    @abstractmethod
    def install_arithmetic(self) -> None:
        """Makes a row of a forward pass have the same bits whatever the other rows are, in the whole process."""

    @abstractmethod
    def uninstall_arithmetic(self) -> None:
        """Takes `install_arithmetic` back."""

    @abstractmethod
    def backward_arithmetic(self) -> AbstractContextManager:
        """For a backward pass inside the arithmetic: one order of sums, which may depend on the number of rows."""

    def load_kernels(self) -> None:
        """Compiles what C++ kernels the arithmetic has, at their first use, and loads them.

        Raises:
            ValueError, RuntimeError, OSError: they cannot be; say why.
        """

    @abstractmethod
    def check_attention(self, head_size: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
        """Raises ValueError where the kernels cannot serve, or are told to be what they cannot; says what they can."""

    def check_backend(self, name: str) -> None:
        """Raises ValueError for a name of vLLM's attention backends that this device cannot take; empty: its own."""
        if name:
            raise ValueError(f"attention_backend = {name!r}: this device has one backend, and no choice; leave it out")

    def check_block_size(self, block_size: int) -> None:
        """Raises ValueError for a size of the KV cache's blocks, in tokens, that the paged kernel cannot serve."""

    @abstractmethod
    def packed_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        scale: float,
        longest: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `devices/attention.py`: output [T, Hq, D], and what `packed_backward` wants, [Hq, T] fp32."""

    @abstractmethod
    def packed_backward(
        self,
        dout: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cu_seqlens: torch.Tensor,
        scale: float,
        longest: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query, key and value, with one order of sums."""

    @abstractmethod
    def arithmetic(self) -> str:
        """Names what decides the bits here: two processes in which it differs compute other ones."""

    @abstractmethod
    def prepare_model(self, model: torch.nn.Module) -> None:
        """For a model that only generates, with its weights loaded: what makes its products fast."""

    @abstractmethod
    def weights_changed(self, model: torch.nn.Module) -> None:
        """Brings up to date what `prepare_model` made of weights that have changed in place; WeightTransferError."""

    # vLLM's own arithmetic (VLLM_COMPAT), with a backward.

    @abstractmethod
    def vllm_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x (..., C) times weight (N, C): (..., N)."""

    @abstractmethod
    def vllm_silu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, all (rows, N)."""

    @abstractmethod
    def vllm_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        total: torch.Tensor,
        rstd: torch.Tensor,
    ) -> torch.Tensor:
        """The normalized sum of x and residual, (..., C) in x's dtype; forward only.

        `total` is that sum in fp32 and `rstd` (..., 1) its 1 / sqrt(mean square + eps), which the backward needs too.
        """

    # The processes of a job.

    @abstractmethod
    def prepare_trainer(self) -> None:
        """Lets torchtitan's Trainer run here; call it before that is built. The second call changes nothing."""

    @abstractmethod
    def engine_environment(self, tensor_parallel_degree: int, num_threads: int) -> dict[str, str]:
        """Variables that vLLM reads at import, for a process that will run an engine."""

    @abstractmethod
    def engine_arguments(self, attention_backend: str, cuda_graphs: bool) -> dict[str, Any]:
        """What vLLM's LLM is given beside the model."""

    @abstractmethod
    def prepare_vllm(self, batch_invariant: bool) -> None:
        """Fixes and, if asked for, arithmetic and attention of a vLLM process; vLLM calls it in each, perhaps twice."""

    @abstractmethod
    def give_back_memory(self) -> None:
        """Lets the system have what this process freed."""
