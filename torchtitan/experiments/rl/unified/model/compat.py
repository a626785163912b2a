# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The VLLM_COMPAT trainer: TorchTitan's Qwen3 and its parameters, computing what vLLM's Qwen3ForCausalLM computes.

Bit for bit where both sides run in `batch_invariant_mode`. vLLM multiplies by fused weights, keeps the residual stream
beside the layers' outputs and normalizes their sum before it is rounded, and rotates by a kernel of its own.

T counts the tokens of a packed batch, C is the model's width, H a number of heads, D the size of one.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional as F
from torchtitan.models.attention import VarlenMetadata
from torchtitan.models.qwen3.model.model import Attention, FeedForward, Qwen3Model, TransformerBlock

# vLLM's DEFAULT_VOCAB_PADDING_SIZE: its output projection has a multiple of so many rows.
VOCAB_MULTIPLE = 64


def to_compat(model: Qwen3Model, tensor_parallel_degree: int = 1) -> Qwen3Model:
    """Gives the modules of `model` vLLM's arithmetic, in place; parameters, names and the state dict stay.

    Call it before the model is parallelized. It may be on the meta device. Imports vLLM's kernels, not its engine.

    Args:
        model: TorchTitan's, with `attn_type` "varlen".
        tensor_parallel_degree: ranks that will share it.

    Returns:
        The same model. Its forward takes `tokens` (1, T), `attention_masks` (VarlenMetadata) and `positions` (1, T)
        and returns logits (1, T, vocabulary), as before.

    Raises:
        ValueError: `model` is not a dense Qwen3 with normalized queries and keys, or its vocabulary cannot be shared.
    """
    if type(model) is not Qwen3Model or model.model_args.moe_enabled or not model.model_args.qk_norm:
        raise ValueError(
            '[rl] mode = "vllm_compat" knows the dense Qwen3 with normalized queries and keys only, not '
            f'{getattr(model, "model_args", type(model).__name__)}; mode = "unified" runs any TrainSpec\'s model'
        )
    _rotary_kernel()
    for module in list(model.modules()):
        module.__class__ = _COMPAT.get(type(module), type(module))
    if model.vocab_size % VOCAB_MULTIPLE:
        if tensor_parallel_degree > 1:
            raise ValueError(
                f'tensor parallelism in [rl] mode = "vllm_compat" wants a vocabulary that is a multiple of '
                f'{VOCAB_MULTIPLE}, this has {model.vocab_size} tokens; use mode = "unified" or no tensor parallelism'
            )
        model.output.__class__ = PaddedOutput
    return model


class CompatModel(Qwen3Model):
    """vLLM's Qwen3Model and output projection."""

    def forward(self, tokens: torch.Tensor, attention_masks: VarlenMetadata, positions: torch.Tensor) -> torch.Tensor:
        """Logits (1, T, vocabulary) of `tokens` (1, T) at `positions` (1, T) in their sequences."""
        hidden_TC, residual_TC = self.tok_embeddings(tokens).flatten(0, 1), None
        cos, _, sin, _ = self.rope_cache[positions.flatten()].to(hidden_TC.dtype).chunk(4, dim=-1)
        rope_TD = torch.cat((cos, sin), dim=-1)
        for layer in self.layers.values():
            hidden_TC, residual_TC = layer(hidden_TC, residual_TC, rope_TD, attention_masks)
        hidden_TC, _ = self.norm(hidden_TC, residual_TC)
        return self.output(hidden_TC).unflatten(0, tokens.shape)


class CompatBlock(TransformerBlock):
    """vLLM's Qwen3DecoderLayer."""

    def forward(
        self,
        hidden_TC: torch.Tensor,
        residual_TC: torch.Tensor | None,
        rope_TD: torch.Tensor,
        attention_masks: VarlenMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, not yet added to the residual stream, and the stream; `residual_TC` None: starts it."""
        hidden_TC, residual_TC = self.attention_norm(hidden_TC, residual_TC)
        hidden_TC = self.attention(hidden_TC, rope_TD, attention_masks)
        hidden_TC, residual_TC = self.ffn_norm(hidden_TC, residual_TC)
        return self.feed_forward(hidden_TC), residual_TC


class CompatAttention(Attention):
    """vLLM's Qwen3Attention."""

    def forward(self, hidden_TC: torch.Tensor, rope_TD: torch.Tensor, attention_masks: VarlenMetadata) -> torch.Tensor:
        """Attention output (T, C)."""
        projections = self.wq, self.wk, self.wv
        xq, xk, xv = (x.unflatten(-1, (-1, self.head_dim)) for x in _fused_linear(hidden_TC, projections))
        xq, xk = _Rotate.apply(self.q_norm(xq)[0], rope_TD), _Rotate.apply(self.k_norm(xk)[0], rope_TD)
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (xq, xk, xv))
        return self.wo(self.inner_attention(*heads_first, attention_masks, scale=self.scaling).flatten(1))


class CompatFeedForward(FeedForward):
    """vLLM's Qwen2MLP."""

    def forward(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Output (T, C)."""
        gate, up = _fused_linear(hidden_TC, (self.w1, self.w3))
        if gate.is_cuda:
            from torchtitan.experiments.rl.unified.model.compat_cuda import SiluAndMul

            return self.w2(SiluAndMul.apply(gate, up))
        return self.w2(F.silu(gate) * up)


class CompatRMSNorm(nn.RMSNorm):
    """vLLM's RMSNorm, with its fused addition."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalized sum of `x` and `residual`, and the sum; both of `x`'s shape (..., width) and dtype."""
        weight = self.weight
        if isinstance(weight, DTensor):  # replicated; of the heads' norms (T, H, D) each rank sees its own heads
            weight = weight.to_local(grad_placements=[Partial() if x.ndim == 3 else Replicate()])
        return _AddRMSNorm.apply(x, residual, weight, self.eps)


class CompatLinear(nn.Linear):
    """vLLM's product: torch's on a CPU, a kernel of its own on CUDA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(x, self.weight)


class PaddedOutput(nn.Linear):
    """An output projection with vLLM's number of rows, which may decide how a matrix product blocks its columns."""

    def forward(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Logits (T, vocabulary)."""
        padding = -self.out_features % VOCAB_MULTIPLE
        return _linear(hidden_TC, F.pad(self.weight, (0, 0, 0, padding)))[..., : self.out_features]


_COMPAT: dict[type, type] = {
    Qwen3Model: CompatModel,
    TransformerBlock: CompatBlock,
    Attention: CompatAttention,
    FeedForward: CompatFeedForward,
    nn.RMSNorm: CompatRMSNorm,
    nn.Linear: CompatLinear,
}


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return F.linear(x, weight)
    from torchtitan.experiments.rl.unified.model.compat_cuda import Linear

    return Linear.apply(x, weight)


def _fused_linear(x: torch.Tensor, linears: tuple[nn.Linear, ...]) -> tuple[torch.Tensor, ...]:
    """The outputs of `linears` on `x` (T, C), as one product: its bits may depend on the number of columns."""
    weights = [linear.weight for linear in linears]
    if isinstance(weights[0], DTensor):  # sharded by rows, as ColwiseParallel does it
        x = DTensor.from_local(x, weights[0].device_mesh, [Replicate()], run_check=False)
        x = x.to_local(grad_placements=[Partial()])
        weights = [weight.to_local() for weight in weights]
    return _linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)


class _AddRMSNorm(torch.autograd.Function):
    """vLLM's native fused_add_rms_norm (`vllm/ir/ops/layernorm.py`); without a residual its rms_norm.

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
        if x.is_cuda:
            from torchtitan.experiments.rl.unified.model.compat_cuda import add_rms_norm

            return add_rms_norm(x, residual, weight, eps), rounded
        return ((total * rstd).to(weight.dtype) * weight).to(x.dtype), rounded

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


class _Rotate(torch.autograd.Function):
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
    _rotary_kernel()(torch.arange(len(x), device=x.device), out.view(len(x), -1), None, x.shape[-1], rope, True)
    return out


@functools.cache
def _rotary_kernel() -> Callable[..., None]:
    """vLLM's, which fuses multiplications with additions: torch's operations round in other places."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return torch.ops._C.rotary_embedding
