# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The attention that a trained policy runs, in the place of TorchTitan's own."""

import torch
from torch import nn
from torch.nn import functional as F
from torchtitan.experiments.rl.unified.devices.attention import packed_attention, to_packed
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
            attention_masks: `cu_seq_q` (sequences + 1,) int32 counts the tokens of the flattened (bs, seq), `max_q`
                bounds a sequence's.
            scale: factor on the scores; head_dim ** -0.5 if None.

        Returns:
            (bs * seq, heads, head_dim).

        Raises:
            ValueError: for a head size, dtype, device or `cu_seq_q` that the kernel cannot serve.
        """
        scale = xq.shape[-1] ** -0.5 if scale is None else scale
        starts, longest = attention_masks.cu_seq_q, attention_masks.max_q
        return packed_attention(to_packed(xq), to_packed(xk), to_packed(xv), starts, scale, longest)


class StockAttention(nn.Module):
    """torch's scaled_dot_product_attention on each packed sequence by itself: `[parity] check = "off"`.

    Signature and shapes as `PackedAttention`'s; any head size, dtype and device of torch's.
    """

    def forward(
        self,
        xq: torch.Tensor,
        xk: torch.Tensor,
        xv: torch.Tensor,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attends within the sequences of `attention_masks.cu_seq_q`, which lie in one row: bs is 1."""
        if xq.is_cuda and xq.dtype != torch.float32:
            return self._flash(*(to_packed(x) for x in (xq, xk, xv)), attention_masks, scale)
        lengths = attention_masks.cu_seq_q.diff().tolist()
        sequences = zip(*(x.split(lengths, dim=2) for x in (xq, xk, xv)), strict=True)
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            for q, k, v in sequences
        ]
        return to_packed(torch.cat(outputs, dim=2)).contiguous()

    @staticmethod
    def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: VarlenMetadata, scale: float | None):
        """torch's FlashAttention 2: one launch for all sequences."""
        starts, longest = masks.cu_seq_q, masks.max_q
        args = q, k, v, starts, starts, longest, longest, 0.0, True, False
        return torch.ops.aten._flash_attention_forward(*args, scale=scale)[0]
