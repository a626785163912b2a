# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Matrix products on a CPU by kernels of this package; csrc/linear.h states the order of their sums."""

import ctypes
import functools
import os

import torch
from torch import nn
from torchtitan.experiments.rl.unified.devices.build import load_library
from torchtitan.experiments.rl.unified.errors import WeightTransferError

# As in csrc/linear_isa.h, each one includes those before it.
ISAS = ("avx2", "avx512", "avx512_bf16", "amx")
_VARIABLE = "RL_CPU_ISA"


def isa(dtype: torch.dtype) -> str:
    """The instruction set that products of this dtype (float32 or bfloat16) are computed by in this process.

    Processes in which it differs compute other bits. It is the best of the CPU, or what RL_CPU_ISA caps it to.

    Raises:
        ValueError: RL_CPU_ISA names no instruction set, or one that this CPU lacks, or the CPU has none of them.
    """
    return ISAS[library().used(dtype == torch.bfloat16)]


def use_isa(name: str | None) -> None:
    """Products are computed by this instruction set from now on, in the whole process; None: as RL_CPU_ISA says.

    Raises:
        ValueError: as `isa` does.
    """
    _use(library(), name)


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, built at first use and set to what RL_CPU_ISA says.

    Raises:
        ValueError: as `isa` does.
        RuntimeError: see `load_library`.
    """
    library = load_library("ops")
    _use(library, None)
    return library


def check_variable() -> None:
    """Raises ValueError if RL_CPU_ISA names no instruction set, or one that this CPU lacks; cheap where it is unset."""
    if not os.environ.get(_VARIABLE):
        return
    try:
        _use(library(), None)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _use(library: ctypes.CDLL, name: str | None) -> None:
    best = library.best()
    if best < 0:
        raise ValueError("this CPU has no AVX2 with FMA: batch-invariant products need it")
    name = name or os.environ.get(_VARIABLE) or ISAS[best]
    if name not in ISAS:
        raise ValueError(f"{_VARIABLE}={name} is none of {', '.join(ISAS)}")
    if ISAS.index(name) > best:
        raise ValueError(f"{_VARIABLE}={name}: this CPU's best is {ISAS[best]}; unset it, or set it to that or less")
    library.use(ISAS.index(name))


class PackedWeight:
    """A linear's weight, or several of one width as one, in the order that the kernels read.

    Args:
        weights: [n_i, k] each, float32 or bfloat16, one dtype; the product has their sum of n_i columns, in order.

    Raises:
        ValueError: no weights, or weights that differ in k or dtype.
    """

    def __init__(self, *weights: torch.Tensor) -> None:
        if not weights or any(w.dim() != 2 for w in weights):
            raise ValueError("PackedWeight takes one or more matrices [n, k]")
        library()
        self.dtype, self.k = weights[0].dtype, weights[0].shape[1]
        self.n = sum(len(w) for w in weights)
        words = torch.ops.rl_unified.packed_size(self.n, self.k, self.dtype)
        self.words = torch.zeros(words, dtype=torch.int32)
        self.update(*weights)

    def update(self, *weights: torch.Tensor) -> None:
        """Packs changed weights into the same memory.

        Raises:
            ValueError: not the shapes or the dtype that this was made of.
        """
        found = [(w.dtype, w.dim(), w.shape[-1]) for w in weights]
        if any(f != (self.dtype, 2, self.k) for f in found) or sum(len(w) for w in weights) != self.n:
            raise ValueError(
                f"weights of {[tuple(w.shape) for w in weights]}, {[w.dtype for w in weights]}: "
                f"they are [n, {self.k}] in {self.dtype}, {self.n} rows in all"
            )
        offset = 0
        for weight in weights:
            torch.ops.rl_unified.pack_weight.default(self.words, self.n, offset, weight.detach())
            offset += len(weight)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` with the bits of torch.nn.functional.linear inside the mode; it has no gradient.

    Args:
        x: [.., k], of the weight's dtype.
        weight: [n, k], packed.
        bias: [n], of the same dtype.

    Returns:
        [.., n]

    Raises:
        ValueError: shapes or dtypes that don't fit, or numbers that ask for a gradient.
    """
    if x.dtype != weight.dtype or x.shape[-1] != weight.k:
        raise ValueError(
            f"numbers of shape {tuple(x.shape)} in {x.dtype} don't meet a packed weight of {weight.n} x {weight.k} in "
            f"{weight.dtype}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
        raise ValueError("a product with a packed weight has no gradient: call it under torch.no_grad()")
    return torch.ops.rl_unified.packed_linear.default(x, weight.words, weight.n, bias)


class PackedLinear(nn.Linear):
    """A linear that only generates: computes from a packed copy of its weight."""

    packed: PackedWeight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.packed, self.bias)


def pack_linears(model: nn.Module) -> None:
    """Gives every plain linear of the model a packed copy of its weight, in place; sharded ones stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight.data) is torch.Tensor:
            module.packed = PackedWeight(module.weight)
            module.__class__ = PackedLinear


def repack_linears(model: nn.Module) -> None:
    """Packs every weight of `pack_linears` again, which has changed, and looks whether the copy is its weight's.

    Raises:
        WeightTransferError: names the module whose packed copy gives another product than its weight.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(packed := getattr(module, "packed", None), PackedWeight):
                packed.update(module.weight)
                row = torch.linspace(-1, 1, packed.k).to(packed.dtype)[None]
                if not torch.equal(linear(row, packed), nn.functional.linear(row, module.weight)):
                    raise WeightTransferError(f"the packed copy of {name} is not its weight; start the engine again")
