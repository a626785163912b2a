# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""vLLM's arithmetic in the trainer, for any family: norms, rotation, products."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional as F
from torchtitan.experiments.rl.unified.devices import device_of

# vLLM's DEFAULT_VOCAB_PADDING_SIZE: its output projection has a multiple of so many rows.
VOCAB_MULTIPLE = 64


class CompatRMSNorm(nn.RMSNorm):
    """vLLM's RMSNorm, with its fused addition."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalized sum of `x` and `residual`, and the sum; both of `x`'s shape (..., width) and dtype."""
        weight = self.weight
        if isinstance(weight, DTensor):  # replicated; of the heads' norms (T, H, D) each rank sees its own heads
            weight = weight.to_local(grad_placements=[Partial() if x.ndim == 3 else Replicate()])
        return AddRMSNorm.apply(x, residual, weight, self.eps)


class CompatLinear(nn.Linear):
    """vLLM's product: torch's on a CPU, a kernel of its own on CUDA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return device_of(x).vllm_linear(x, self.weight)


class PaddedOutput(nn.Linear):
    """An output projection with vLLM's number of rows, which may decide how a matrix product blocks its columns."""

    def forward(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Logits (T, vocabulary)."""
        padding = -self.out_features % VOCAB_MULTIPLE
        return device_of(hidden_TC).vllm_linear(hidden_TC, F.pad(self.weight, (0, 0, 0, padding)))[
            ..., : self.out_features
        ]


def fused_linear(x: torch.Tensor, linears: tuple[nn.Linear, ...]) -> tuple[torch.Tensor, ...]:
    """The outputs of `linears` on `x` (T, C), as one product: its bits may depend on the number of columns."""
    weights = [linear.weight for linear in linears]
    if isinstance(weights[0], DTensor):  # sharded by rows, as ColwiseParallel does it
        x = DTensor.from_local(x, weights[0].device_mesh, [Replicate()], run_check=False)
        x = x.to_local(grad_placements=[Partial()])
        weights = [weight.to_local() for weight in weights]
    return device_of(x).vllm_linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)


class AddRMSNorm(torch.autograd.Function):
    """vLLM's fused_add_rms_norm; without a residual its rms_norm.

    y = s / sqrt(mean(s^2) + eps) * w of the fp32 sum s (Zhang and Sennrich, 2019), rounded before the factor w.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        total = x.float() if residual is None else x.float() + residual.float()
        rstd = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + eps)
        rounded = x if residual is None else total.to(x.dtype)
        ctx.save_for_backward(rounded, rstd, weight)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return device_of(x).vllm_add_rms_norm(x, residual, weight, eps, total, rstd), rounded

    @staticmethod
    def backward(ctx, grad_out, grad_sum):
        rounded, rstd, weight = ctx.saved_tensors
        grad_out = grad_out.float()
        normalized = rounded.float() * rstd
        scaled = grad_out * weight.float()
        grad = rstd * (scaled - normalized * (scaled * normalized).mean(dim=-1, keepdim=True))
        grad = (grad if grad_sum is None else grad + grad_sum).to(rounded.dtype)
        grad_weight = (grad_out * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        return grad, grad if ctx.has_residual else None, grad_weight, None


class Rotate(torch.autograd.Function):
    """Rotates the halves of each head of `x` (T, H, D) by `rope` (T, D): D / 2 cosines, then sines."""

    @staticmethod
    def forward(ctx, x, rope):
        ctx.save_for_backward(rope)
        return _rotated(x, rope)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors[0].chunk(2, dim=-1)
        return _rotated(grad, torch.cat((cos, -sin), dim=-1)), None


def _rotated(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    rotary_kernel()(torch.arange(len(x), device=x.device), out.view(len(x), -1), None, x.shape[-1], rope, True)
    return out


@functools.cache
def rotary_kernel() -> Callable[..., None]:
    """vLLM's, which fuses multiplications with additions: torch's operations round in other places."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return torch.ops._C.rotary_embedding
