# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Causal attention with one reduction order, inside packed sequences: an operation with a backward, on any device.

A row (one query token, one head) has the same bits whether it is decoded alone, prefilled in one piece or in chunks, or
computed in a packed training batch, for any block table, batch and number of threads. D is the head size, Hq and
Hkv the numbers of query and key/value heads (Hq a multiple of Hkv), T the tokens and S the sequences of a batch.
"""

import torch
from torchtitan.experiments.rl.unified.devices import device_of


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    longest: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each of the sequences that are packed one after another; differentiable.

    The backward computes the probabilities again, tile by tile (no T x T matrix), with one order of sums: two calls
    give equal bits. It reaches query, key and value.

    Args:
        query: [T, Hq, D], any strides whose last dimension is dense.
        key, value: [T, Hkv, D], likewise, in query's dtype.
        cu_seqlens: [S + 1] int32 on query's device, from 0 to T, not falling.
        scale: factor on the scores.
        longest: a bound of the sequences' lengths. With it a GPU takes cu_seqlens as it is; looking into it would wait
            for the GPU.

    Returns:
        [T, Hq, D], dense, in query's dtype.

    Raises:
        ValueError: a head size, dtype, device, or cu_seqlens the kernel cannot serve.
    """
    out, _ = _packed_forward(query, key, value, cu_seqlens, scale, longest or 0)
    return out


def to_packed(x: torch.Tensor) -> torch.Tensor:
    """(bs, heads, seq, head_dim) as (bs * seq, heads, head_dim); a view where x is a transpose of (bs, seq, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def _check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int) -> None:
    starts = cu_seqlens.tolist()
    if cu_seqlens.dtype != torch.int32 or starts[:1] != [0] or starts[-1] != tokens or starts != sorted(starts):
        raise ValueError(f"cu_seqlens must be int32, start at 0, not fall, and end at {tokens} tokens: {cu_seqlens}")


@torch.library.custom_op("unified::packed_attention", mutates_args=())
def _packed_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out [T, Hq, D] and the log-sum-exp of each row, [Hq, T] fp32, for the backward.

    What is wrong is found in here, where a compiler does not look.
    """
    device = device_of(query)
    device.check_attention(query.shape[2], query.shape[1], key.shape[1], query.dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if device.in_host_memory or not longest:
        _check_cu_seqlens(cu_seqlens, len(query))
        longest = longest or int(cu_seqlens.diff().max())
    return device.packed_forward(query, key, value, cu_seqlens, scale, longest)


@torch.library.custom_op("unified::packed_attention_backward", mutates_args=())
def _packed_backward(
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
    """Returns the gradients of query, key and value, in their dtype."""
    longest = longest or int(cu_seqlens.diff().max())
    return device_of(query).packed_backward(dout, query, key, value, out, lse, cu_seqlens, scale, longest)


@_packed_forward.register_fake
def _(query, key, value, cu_seqlens, scale, longest):
    tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(heads, tokens, dtype=torch.float32)


@_packed_backward.register_fake
def _(dout, query, key, value, out, lse, cu_seqlens, scale, longest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx, inputs, output) -> None:
    query, key, value, cu_seqlens, ctx.scale, ctx.longest = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _backward(ctx, dout, _dlse):
    *saved, cu_seqlens = ctx.saved_tensors
    return *_packed_backward(dout, *saved, cu_seqlens, ctx.scale, ctx.longest), None, None, None


_packed_forward.register_autograd(_backward, setup_context=_save)
