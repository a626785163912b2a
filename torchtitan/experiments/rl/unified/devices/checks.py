# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What the batch-invariant arithmetic covers."""

import torch
from torch import nn

DTYPES = (torch.float32, torch.bfloat16)
# Exactly these: a subclass may compute something else, as quantised linears do.
_MODULES = (nn.Linear, nn.Embedding, nn.RMSNorm)


def check_supported(model: nn.Module, also: tuple[type[nn.Module], ...] = ()) -> None:
    """Refuses a model whose weights meet arithmetic that may depend on the batch.

    Args:
        model: as its TrainSpec and model converters made it, not yet parallelized; may be on the meta device.
        also: more modules that are covered.

    Raises:
        ValueError: names the first module that has weights and is not covered, or the first weight of another dtype.
    """
    for name, module in model.named_modules():
        for weight_name, weight in module.named_parameters(recurse=False):
            if type(module) not in _MODULES + also:
                raise ValueError(_refusal(f"{name or 'the model'} ({type(module).__name__})"))
            if weight.dtype not in DTYPES:
                raise ValueError(_refusal(f"{name}.{weight_name} in {weight.dtype}"))


def _refusal(what: str) -> str:
    return f'batch-invariant arithmetic does not cover {what}; [parity] check = "off" runs it without'


def check_heads(
    device: str,
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> None:
    """Raises ValueError where a device's attention kernels, which have `sizes` and `dtypes`, cannot serve a model."""
    if head_size not in sizes:
        raise ValueError(
            f"batch-invariant attention has no kernel for head size {head_size} on {device}; it has {sizes}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads")
    if dtype not in dtypes:
        raise ValueError(f"batch-invariant attention on {device} computes in {dtypes}, not in {dtype}")
