# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Causal attention with one reduction order: on a CPU paged and packed (``csrc/attention.cpp``), on CUDA `flash.py`.

A row (one query token, one head) has the same bits whether it is decoded alone, prefilled in one piece or in chunks, or
computed in a packed training batch, for any block table, batch and number of threads. D is the head size, Hq and
Hkv the numbers of query and key/value heads (Hq a multiple of Hkv), T the tokens and S the sequences of a batch.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torchtitan.experiments.rl.unified.batch_invariant import flash
from torchtitan.experiments.rl.unified.batch_invariant.build import load_library

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
DTYPES = (torch.float32, torch.bfloat16)
BLOCK_MULTIPLE = 32  # keys that lie side by side in the cache (kSub of the C++ source)

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_STRIDED = (_POINTER, _INT64, _INT64)
_SIZES = (_INT64, _INT, _INT, _INT, _INT64, _FLOAT, _INT, _INT)  # T, S, Hq, Hkv, D, scale, is_bf16, threads


@functools.cache
def _kernel(name: str, *argtypes: type) -> Callable[..., None]:
    function = getattr(load_library("attention"), name)
    function.argtypes = argtypes
    function.restype = None
    return function


def check_attention(
    head_size: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype, device_type: str = "cpu"
) -> None:
    """Raises ValueError where the device's kernel cannot serve: head size, head counts, dtype or kind of GPU."""
    sizes, dtypes = (flash.HEAD_SIZES, flash.DTYPES) if device_type == "cuda" else (HEAD_SIZES, DTYPES)
    if head_size not in sizes:
        raise ValueError(
            f"batch-invariant attention has no kernel for head size {head_size} on {device_type}; it has {sizes}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads")
    if dtype not in dtypes:
        raise ValueError(f"batch-invariant attention on {device_type} computes in {dtypes}, not in {dtype}")
    if device_type == "cuda":
        flash.check_device()


def _strided(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _sizes(query: torch.Tensor, key: torch.Tensor, sequences: int, scale: float) -> tuple:
    tokens, heads, head_size = query.shape
    is_bf16 = query.dtype == torch.bfloat16
    return tokens, sequences, heads, key.shape[1], head_size, scale, is_bf16, torch.get_num_threads()


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Writes the batch's keys and values into the paged cache, then attends over it.

    The inside of a block is this kernel's own: K as [block_size / 32, D, 32], then V as [block_size, D]. vLLM only
    ever moves whole blocks.

    Args:
        query: [T, Hq, D], last dimension dense; T counts the tokens of all sequences, without padding.
        key, value: [T, Hkv, D], last dimension dense.
        kv_cache: [blocks, Hkv, block_size, 2 * D], each [block_size, 2 * D] dense, block_size a multiple of 32.
        query_start_loc: [S + 1] int32, where each sequence's tokens start in this batch.
        seq_lens: [S] int32, keys of each sequence, this batch's included.
        block_table: [S, >= blocks of the longest] int32.
        slot_mapping: [>= T] int64, block * block_size + offset of each token; negative: not written.
        scale: factor on the scores.
        output: [T, Hq, D] dense, written.
    """
    kernel = _kernel(
        "paged_attention", *_STRIDED * 3, _POINTER, _POINTER, _INT64, _INT64, _INT, _POINTER, _POINTER, _POINTER,
        _INT64, _POINTER, *_SIZES,
    )  # fmt: skip
    kernel(
        *_strided(query),
        *_strided(key),
        *_strided(value),
        output.data_ptr(),
        *_strided(kv_cache),
        kv_cache.shape[2],
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        slot_mapping.data_ptr(),
        *_sizes(query, key, seq_lens.shape[0], scale),
    )


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
    if query.device.type not in ("cpu", "cuda"):
        raise ValueError(f"batch-invariant attention has kernels for CPUs and CUDA; query is on {query.device}")
    check_attention(query.shape[2], query.shape[1], key.shape[1], query.dtype, query.device.type)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if query.device.type == "cuda" and longest is None:
        _check_cu_seqlens(cu_seqlens, len(query))
        longest = int(cu_seqlens.diff().max())
    # The CPU's kernel looks into cu_seqlens itself and needs no bound.
    out, _ = _packed_forward(query, key, value, cu_seqlens, scale, longest or 0)
    return out


def _check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int) -> None:
    starts = cu_seqlens.tolist()
    if cu_seqlens.dtype != torch.int32 or starts[:1] != [0] or starts[-1] != tokens or starts != sorted(starts):
        raise ValueError(f"cu_seqlens must be int32, start at 0, not fall, and end at {tokens} tokens: {cu_seqlens}")


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("unified::packed_attention", mutates_args=(), device_types="cpu")
def _packed_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out [T, Hq, D] and the base-2 log-sum-exp of each row, [Hq, T] fp32."""
    tokens, heads, head_size = query.shape
    kv_heads, sequences = key.shape[1], cu_seqlens.shape[0] - 1
    _check_cu_seqlens(cu_seqlens, tokens)
    query, key, value, cu_seqlens = _dense_rows(query), _dense_rows(key), _dense_rows(value), cu_seqlens.contiguous()
    out = query.new_empty(tokens, heads, head_size)
    lse = query.new_empty(heads, tokens, dtype=torch.float32)
    packed_keys = key.new_empty(kv_heads * (tokens // BLOCK_MULTIPLE + sequences) * head_size * BLOCK_MULTIPLE)
    kernel = _kernel("packed_attention", *_STRIDED * 3, *[_POINTER] * 4, *_SIZES)
    kernel(
        *_strided(query),
        *_strided(key),
        *_strided(value),
        out.data_ptr(),
        lse.data_ptr(),
        packed_keys.data_ptr(),
        cu_seqlens.data_ptr(),
        *_sizes(query, key, sequences, scale),
    )
    return out, lse


@torch.library.custom_op("unified::packed_attention_backward", mutates_args=(), device_types="cpu")
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
    """Returns the gradients of query, key and value, dense, in their dtype."""
    query, key, value, dout = _dense_rows(query), _dense_rows(key), _dense_rows(value), _dense_rows(dout)
    cu_seqlens = cu_seqlens.contiguous()
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
    kernel = _kernel(
        "packed_attention_backward", *_STRIDED * 3, _POINTER, _POINTER, *_STRIDED, *[_POINTER] * 4, *_SIZES
    )
    kernel(
        *_strided(query),
        *_strided(key),
        *_strided(value),
        out.data_ptr(),
        lse.data_ptr(),
        *_strided(dout),
        *(g.data_ptr() for g in grads),
        cu_seqlens.data_ptr(),
        *_sizes(query, key, cu_seqlens.shape[0] - 1, scale),
    )
    return grads


_packed_forward.register_kernel("cuda")(flash.packed_forward)
_packed_backward.register_kernel("cuda")(flash.packed_backward)


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
