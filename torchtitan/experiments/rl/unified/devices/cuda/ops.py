# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""vLLM's batch-invariant kernels for CUDA, with an end to them. Importing this module imports vLLM."""

import contextlib
import os
from collections.abc import Iterator

import torch
from vllm.model_executor.determinism import batch_invariant as vllm_batch_invariant
from vllm.v1.sample.ops import topk_topp_triton

# TF32 rounds a product's inputs; vLLM switches it off beside its mode.
_PRECISIONS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
_SETTINGS = [(module, "fp32_precision") for module in _PRECISIONS]
_SETTINGS += [(torch.backends.cuda.matmul, f"allow_{dtype}_reduced_precision_reduction") for dtype in ("fp16", "bf16")]
# Rows of a batch up to this size take another top-p kernel, which cuts at another place.
_SETTINGS += [(topk_topp_triton, "_SPLIT_MAX_BATCH")]
# What uninstall puts back; empty where vLLM had switched its mode on, for good.
_before: list[object] = []


def install() -> None:
    """Switches vLLM's mode on, with exact fp32 products, in the whole process.

    From Hopper on, cuBLAS reads from the environment, at its first product, that it must not split sums; vLLM's own
    kernels read VLLM_BATCH_INVARIANT at their first call: install before those.
    """
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    if vllm_batch_invariant._batch_invariant_MODE:
        enable_for_vllm_process()
        return
    _before[:] = [torch.backends.cuda.preferred_blas_library(), *(getattr(module, name) for module, name in _SETTINGS)]
    vllm_batch_invariant.enable_batch_invariant_mode()
    for module in _PRECISIONS:
        module.fp32_precision = "ieee"
    enable_for_vllm_process()


def enable_for_vllm_process() -> None:
    """Adds to vLLM's own mode what it lacks: one top-p kernel for every batch size."""
    topk_topp_triton._SPLIT_MAX_BATCH = 0


@contextlib.contextmanager
def backward_arithmetic() -> Iterator[None]:
    """Products by cuBLAS, which remembers the kernel it chose; cuBLASLt chooses anew at each call, for 0.1 ms."""
    _use_blas("cublas", splits=True)  # It cannot be told not to split sums.
    try:
        yield
    finally:
        _use_blas("cublaslt", splits=False)


def _use_blas(library: str, splits: bool) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False, splits
    torch.backends.cuda.preferred_blas_library(library)


def uninstall() -> None:
    """Gives torch its kernels and settings back."""
    if not _before:
        return
    vllm_batch_invariant._batch_invariant_LIB._destroy()
    vllm_batch_invariant._batch_invariant_LIB = None
    vllm_batch_invariant._batch_invariant_MODE = False
    blas, *values = _before
    torch.backends.cuda.preferred_blas_library(blas)
    for (module, name), value in zip(_SETTINGS, values, strict=True):
        setattr(module, name, value)
    _before.clear()
