# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Qwen3."""

from typing import Any

import torch
from torch import nn
from torchtitan.experiments.rl.unified.devices import device_of
from torchtitan.experiments.rl.unified.families.vllm_arithmetic import (
    CompatLinear,
    CompatRMSNorm,
    fused_linear,
    PaddedOutput,
    rotary_kernel,
    Rotate,
    VOCAB_MULTIPLE,
)
from torchtitan.models.attention import VarlenMetadata
from torchtitan.models.qwen3.model.model import Attention, FeedForward, Qwen3Model, TransformerBlock

TINY_QWEN3: dict[str, Any] = {
    "vocab_size": 512,
    "max_seq_len": 1024,
    "head_dim": 32,
    "dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "hidden_dim": 384,
    "qk_norm": True,
    "rope_theta": 10000,
    "enable_weight_tying": True,
}


# Hugging Face's config.json -> torchtitan's Qwen3ModelArgs
CONFIG_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "enable_weight_tying",
}


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
    rotary_kernel()
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
        xq, xk, xv = (x.unflatten(-1, (-1, self.head_dim)) for x in fused_linear(hidden_TC, projections))
        xq, xk = Rotate.apply(self.q_norm(xq)[0], rope_TD), Rotate.apply(self.k_norm(xk)[0], rope_TD)
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (xq, xk, xv))
        return self.wo(self.inner_attention(*heads_first, attention_masks, scale=self.scaling).flatten(1))


class CompatFeedForward(FeedForward):
    """vLLM's Qwen2MLP."""

    def forward(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Output (T, C)."""
        gate, up = fused_linear(hidden_TC, (self.w1, self.w3))
        return self.w2(device_of(gate).vllm_silu_and_mul(gate, up))


_COMPAT: dict[type, type] = {
    Qwen3Model: CompatModel,
    TransformerBlock: CompatBlock,
    Attention: CompatAttention,
    FeedForward: CompatFeedForward,
    nn.RMSNorm: CompatRMSNorm,
    nn.Linear: CompatLinear,
}
