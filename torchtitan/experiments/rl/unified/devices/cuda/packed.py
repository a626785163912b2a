# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Packed causal attention on CUDA: FlashAttention with the bits of vLLM's paged FLASH_ATTN backend, and a backward.

T, S, Hq, Hkv and D as in `attention.py`. What makes rows equal to the engine's: vLLM's own build of the kernel, keys
in tiles of one size that start at each sequence's first key, and no split of the keys (num_splits=1), as vLLM runs it
under VLLM_BATCH_INVARIANT=1.
"""

import torch

# Of FlashAttention 3, where paged and packed keys are summed in the same tiles: seen on an H100. With 96 they are not.
HEAD_SIZES = (32, 64, 128, 192, 256)
DTYPES = (torch.bfloat16,)
# With few queries a sequence the kernel sums other numbers of keys at a time, for heads of 64 up to 64 queries (times
# query heads a key head), so it is never told of fewer than these.
LEAST_QUERIES = 65


def check_device() -> None:
    """Raises ValueError on a GPU that FlashAttention 3 does not run on."""
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        raise ValueError(
            "batch-invariant attention on a GPU is FlashAttention 3, for compute capability 9 (Hopper); this is "
            f"{torch.cuda.get_device_name()}, {major}.{minor}"
        )


def packed_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out [T, Hq, D] and the natural log-sum-exp of each row, [Hq, T] fp32; `longest` bounds the lengths."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    out, lse = flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=max(LEAST_QUERIES, longest),
        cu_seqlens_q=cu_seqlens,
        max_seqlen_k=longest,
        cu_seqlens_k=cu_seqlens,
        softmax_scale=scale,
        causal=True,
        num_splits=1,
        fa_version=3,
        return_softmax_lse=True,
    )
    return out, lse


def packed_backward(
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
    """The gradients of query, key and value: torch's FlashAttention 2 backward, with one order of sums."""
    unused = torch.empty(0, device=query.device)  # dropout's state
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return torch.ops.aten._flash_attention_backward(
            dout, query, key, value, out, lse, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, unused, unused,
            scale=scale,
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
