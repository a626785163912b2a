# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""vLLM's batch-invariant CUDA operations of Qwen3, with a backward. Importing this module imports vLLM's kernels.

C is a layer's input width, N its output width; leading dimensions are rows.
"""

import torch
from torch.autograd import Function
from torch.nn import functional as F
from vllm import _custom_ops
from vllm.model_executor.determinism import batch_invariant as vllm_batch_invariant


class Linear(Function):
    """x (..., C) times weight (N, C) by vLLM's persistent Triton kernel; the backward is cuBLAS's."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return vllm_batch_invariant.linear_batch_invariant(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class SiluAndMul(Function):
    """silu(gate) * up, both (T, N)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        torch.ops._C.silu_and_mul(out, torch.cat((gate, up), dim=-1))
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad * F.silu(gate)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The normalized sum of x and residual (rows, C), in x's dtype; no gradient."""
    if residual is None:
        return vllm_batch_invariant.rms_norm_batch_invariant(x, weight, eps)
    out = x.clone(memory_format=torch.contiguous_format)
    _custom_ops.fused_add_rms_norm(out, residual.clone(memory_format=torch.contiguous_format), weight, eps)
    return out
