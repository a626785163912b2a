# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Causal attention on a CPU with one reduction order, paged and packed (``csrc/attention.cpp``).

T, S, Hq, Hkv and D as in `devices/attention.py`.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torchtitan.experiments.rl.unified.devices.build import load_library

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


def packed_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out [T, Hq, D] and the base-2 log-sum-exp of each row, [Hq, T] fp32."""
    tokens, heads, head_size = query.shape
    kv_heads, sequences = key.shape[1], cu_seqlens.shape[0] - 1
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


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
