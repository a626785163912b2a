# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""NVIDIA GPUs."""

import contextlib
import os
from typing import Any

import torch
from torchtitan.experiments.rl.unified.devices.base import Device


class Cuda(Device):
    """FlashAttention and vLLM's batch-invariant kernels."""

    name = "cuda"
    in_host_memory = False
    default_config = "debug_gpu.toml"
    logits_at_once = 1 << 24  # Enough rows for all multiprocessors.
    tensor_parallel_vllm_compat = False

    def cards(self) -> list[str]:
        # torch asks the driver's management library: CUDA itself stays untouched in this process and its forks.
        return [f"GPU {number}" for number in range(torch.cuda.device_count())]

    def use_cards(self, first: int, count: int) -> None:
        cards = len(self.cards())
        if not cards:
            return
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[(first + i) % cards] for i in range(min(count, cards)))

    def install_arithmetic(self) -> None:
        from torchtitan.experiments.rl.unified.devices.cuda import ops

        ops.install()

    def uninstall_arithmetic(self) -> None:
        from torchtitan.experiments.rl.unified.devices.cuda import ops

        ops.uninstall()

    def backward_arithmetic(self) -> contextlib.AbstractContextManager:
        from torchtitan.experiments.rl.unified.devices.cuda import ops

        return ops.backward_arithmetic()

    def check_attention(self, head_size: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
        from torchtitan.experiments.rl.unified.devices.checks import check_heads
        from torchtitan.experiments.rl.unified.devices.cuda import packed

        check_heads(self.name, packed.HEAD_SIZES, packed.DTYPES, head_size, num_heads, num_kv_heads, dtype)
        packed.check_device()

    def check_backend(self, name: str) -> None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if name and name not in AttentionBackendEnum.__members__:
            raise ValueError(f"attention_backend = {name!r}: vLLM has {', '.join(AttentionBackendEnum.__members__)}")

    def check_block_size(self, block_size: int) -> None:
        if block_size % 16:
            raise ValueError(f"block_size {block_size}: FlashAttention has blocks of a multiple of 16 tokens")

    def packed_forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        from torchtitan.experiments.rl.unified.devices.cuda import packed

        return packed.packed_forward(*args)

    def packed_backward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from torchtitan.experiments.rl.unified.devices.cuda import packed

        return packed.packed_backward(*args)

    def arithmetic(self) -> str:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"

    def prepare_model(self, model: torch.nn.Module) -> None:
        pass

    def weights_changed(self, model: torch.nn.Module) -> None:
        pass

    def vllm_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from torchtitan.experiments.rl.unified.devices.cuda.linear import Linear

        return Linear.apply(x, weight)

    def vllm_silu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        from torchtitan.experiments.rl.unified.devices.cuda.linear import SiluAndMul

        return SiluAndMul.apply(gate, up)

    def vllm_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        total: torch.Tensor,
        rstd: torch.Tensor,
    ) -> torch.Tensor:
        from torchtitan.experiments.rl.unified.devices.cuda.linear import add_rms_norm

        return add_rms_norm(x, residual, weight, eps)

    def prepare_trainer(self) -> None:
        pass

    def engine_environment(self, tensor_parallel_degree: int, num_threads: int) -> dict[str, str]:
        # The other runner takes log-probs with kernels of its own, from logits divided by an approximate division.
        found = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}
        return found | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if tensor_parallel_degree == 1 else {})

    def engine_arguments(self, attention_backend: str, cuda_graphs: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "enforce_eager": not cuda_graphs,
            "attention_backend": attention_backend,
            # The KV cache has its size from the job; vLLM only asks that this share of the memory is free.
            "gpu_memory_utilization": 0.05,
        }
        if cuda_graphs:
            arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        return arguments

    def prepare_vllm(self, batch_invariant: bool) -> None:
        if batch_invariant:
            from torchtitan.experiments.rl.unified.devices.cuda import ops, paged

            ops.enable_for_vllm_process()
            paged.register_flash_backend()

    def give_back_memory(self) -> None:
        pass


DEVICE = Cuda()
