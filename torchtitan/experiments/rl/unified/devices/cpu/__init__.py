# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""CPUs."""

import contextlib
import ctypes
import os
from typing import Any

import torch
from torch.nn import functional as F
from torchtitan.experiments.rl.unified.config.control_groups import cores as usable_cores
from torchtitan.experiments.rl.unified.devices.base import Device


class Cpu(Device):
    """x86-64, by kernels of this folder (`csrc/`)."""

    name = "cpu"
    in_host_memory = True
    default_config = "debug_cpu.toml"
    logits_at_once = 1 << 20  # 4 MiB in fp32 stay in the cache.
    tensor_parallel_vllm_compat = True

    def cards(self) -> list[str]:
        return []

    def use_cards(self, first: int, count: int) -> None:
        pass

    def install_arithmetic(self) -> None:
        from torchtitan.experiments.rl.unified.devices.cpu import ops

        ops.install()

    def uninstall_arithmetic(self) -> None:
        from torchtitan.experiments.rl.unified.devices.cpu import ops

        ops.uninstall()

    def backward_arithmetic(self) -> contextlib.AbstractContextManager:
        # The mode's own: its products are as fast as torch's.
        return contextlib.nullcontext()

    def check_attention(self, head_size: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
        from torchtitan.experiments.rl.unified.devices.checks import check_heads
        from torchtitan.experiments.rl.unified.devices.cpu import attention, linear

        linear.check_variable()
        check_heads(self.name, attention.HEAD_SIZES, attention.DTYPES, head_size, num_heads, num_kv_heads, dtype)

    def check_block_size(self, block_size: int) -> None:
        if block_size % 32:
            raise ValueError(f"block_size {block_size}: the paged kernel on a CPU has blocks of a multiple of 32")

    def packed_forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        from torchtitan.experiments.rl.unified.devices.cpu import attention

        return attention.packed_forward(*args)

    def packed_backward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from torchtitan.experiments.rl.unified.devices.cpu import attention

        return attention.packed_backward(*args)

    def load_kernels(self) -> None:
        from torchtitan.experiments.rl.unified.devices.build import load_library
        from torchtitan.experiments.rl.unified.devices.cpu.linear import library

        library()
        load_library("attention")

    def arithmetic(self) -> str:
        from torchtitan.experiments.rl.unified.devices.cpu.linear import isa

        return f"CPU, float32 by {isa(torch.float32)}, bfloat16 by {isa(torch.bfloat16)}"

    def prepare_model(self, model: torch.nn.Module) -> None:
        from torchtitan.experiments.rl.unified.devices.cpu.linear import pack_linears

        if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
            pack_linears(model)

    def weights_changed(self, model: torch.nn.Module) -> None:
        from torchtitan.experiments.rl.unified.devices.cpu.linear import repack_linears

        repack_linears(model)

    def vllm_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    def vllm_silu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    def vllm_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        total: torch.Tensor,
        rstd: torch.Tensor,
    ) -> torch.Tensor:
        # vLLM's native fused_add_rms_norm (`vllm/ir/ops/layernorm.py`); without a residual its rms_norm.
        return ((total * rstd).to(weight.dtype) * weight).to(x.dtype)

    def prepare_trainer(self) -> None:
        from torchtitan.experiments.rl.unified.devices.cpu.torchtitan import prepare_torchtitan

        prepare_torchtitan()

    def engine_environment(self, tensor_parallel_degree: int, num_threads: int) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))
        share = num_threads or max(1, usable_cores() // tensor_parallel_degree)
        if tensor_parallel_degree == 1:
            # The engine stays in this process: its threads are this process's.
            return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | _unless_set("OMP_NUM_THREADS", str(share))
        # vLLM would bind ranks to NUMA nodes, of which a small machine has one.
        ranks = [cores[(rank * share) % len(cores) :][:share] for rank in range(tensor_parallel_degree)]
        return _unless_set("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, rank)) for rank in ranks))

    def engine_arguments(self, attention_backend: str, cuda_graphs: bool) -> dict[str, Any]:
        return {"enforce_eager": True}

    def prepare_vllm(self, batch_invariant: bool) -> None:
        from torchtitan.experiments.rl.unified.devices.cpu import paged, vllm

        vllm.apply()
        if batch_invariant:
            vllm.enable_for_vllm_process()
            paged.register_attention_backend()

    def give_back_memory(self) -> None:
        # glibc keeps blocks of up to 32 MiB, most tensors of a policy.
        ctypes.CDLL(None).malloc_trim(0)


def _unless_set(name: str, value: str) -> dict[str, str]:
    return {name: os.environ.get(name, value)}


DEVICE = Cpu()
