# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The attention that a trained policy runs, in the place of TorchTitan's own."""

from collections.abc import Callable

import torch
from torch import nn
from torchtitan.experiments.rl.unified.batch_invariant.attention import packed_attention
from torchtitan.models.attention import VarlenMetadata


class PackedAttention(nn.Module):
    """Causal attention inside each packed sequence, with the bits of the generator's paged attention.

    Takes the place of `torchtitan.models.attention.VarlenAttentionWrapper`.
    """

    def forward(
        self,
        xq: torch.Tensor,
        xk: torch.Tensor,
        xv: torch.Tensor,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attends within the sequences of `attention_masks.cu_seq_q`.

        Args:
            xq: (bs, heads, seq, head_dim).
            xk, xv: (bs, kv_heads, seq, head_dim).
            attention_masks: `cu_seq_q` (sequences + 1,) int32 counts the tokens of the flattened (bs, seq).
            scale: factor on the scores; head_dim ** -0.5 if None.

        Returns:
            (bs * seq, heads, head_dim).

        Raises:
            ValueError: for a head size, dtype, device or `cu_seq_q` that the kernel cannot serve.
        """
        scale = xq.shape[-1] ** -0.5 if scale is None else scale
        return packed_attention(to_packed(xq), to_packed(xk), to_packed(xv), attention_masks.cu_seq_q, scale)


def to_packed(x: torch.Tensor) -> torch.Tensor:
    """(bs, heads, seq, head_dim) as (bs * seq, heads, head_dim); a view where x is a transpose of (bs, seq, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def replace_inner_attention(model: nn.Module, make: Callable[[str], nn.Module]) -> None:
    """Puts `make(name)` in the place of every module called `inner_attention`; name is its path in `model`.

    Raises:
        ValueError: if the model has no such module.
    """
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] == "inner_attention"]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no module called inner_attention: its attention cannot be replaced"
        )
    for name in names:
        model.set_submodule(name, make(name))
