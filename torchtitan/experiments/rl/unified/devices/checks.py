# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What the batch-invariant arithmetic covers: operations by their names, heads by their sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

DTYPES = (torch.float32, torch.bfloat16)

# Operations of aten that give a row of a forward pass the same bits on every device, whatever the other rows are. A
# test of each device holds it to them.
#
# One rounding an element, the same in a vector and in its tail. Not exp, tanh or sigmoid: torch computes those by two
# formulas; SiLU is the devices' own.
ELEMENTWISE = "abs add div floor_divide masked_fill maximum minimum mul neg relu silu sqrt sub where".split()
ELEMENTWISE += "eq ge gt le lt ne logical_and logical_not logical_or".split()
# Elements go from here to there, or new ones come that no row decides.
MOVES = "_to_copy _unsafe_view arange cat clone copy embedding empty empty_like fill full full_like gather".split()
MOVES += "index index_select new_empty new_full new_zeros ones ones_like scatter stack zero zeros zeros_like".split()
# Over the last dimension, which is not the tokens'.
ROWWISE = "_log_softmax _softmax mean sort".split()
# Over the last dimension of this argument; the devices' own.
PRODUCTS = {"mm": "self", "addmm": "mat1", "bmm": "self"}
# Arguments that are numbers to compute with, not sizes or places.
_NUMBERS = ("alpha", "exponent", "fill_value", "other", "self", "value")
# Primes: no other size in a model is a multiple of them.
_TOKENS, _MORE_TOKENS = 29, 31


class _Refuse(TorchDispatchMode):
    """Raises ValueError at the first operation that is not known to be row-invariant, by its name and module.

    Args:
        modules: that the operations come from.
        tokens: of the forward pass.
        before: what another pass saw, of another number of tokens: no number may depend on it.

    Attributes:
        seen: by operation, in their order, the numbers among its arguments.
    """

    def __init__(self, modules: ModuleTracker, tokens: int, before: "list[tuple] | None" = None) -> None:
        super().__init__()
        self.modules, self.tokens, self.before = modules, tokens, before
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = _arguments(func, args, kwargs or {})
        self.seen.append((func, [given[name] for name in _NUMBERS if isinstance(given.get(name), (int, float))]))
        why = _refused(func, given, self.tokens)
        if why is None and self.before is not None:
            other, numbers = (*self.before[len(self.seen) - 1 : len(self.seen)], (None, None))[0]
            if other != func:
                why = " where another number of tokens has another operation"
            elif numbers != self.seen[-1][1]:
                why = " with a number that depends on how many tokens there are"
        if why is not None:
            module = max(self.modules.parents - {"Global"}, key=len, default="the model")
            raise ValueError(
                f'batch-invariant arithmetic does not know {func} in {module}{why}; [parity] check = "off" runs it'
            )
        return func(*args, **(kwargs or {}))


def check_operations(forward: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    """Looks at every operation of a forward pass as torch dispatches it.

    Args:
        forward: of a model whose tensors are real (on no meta device) and whose attention is not torch's own; it takes
            token ids, all 0, and positions, both (1, tokens).

    Raises:
        ValueError: names the first operation that is not known to be row-invariant, and its module.
    """
    before = None
    for count in (_TOKENS, _MORE_TOKENS):
        tokens, positions = torch.zeros(1, count, dtype=torch.int64), torch.arange(count)[None]
        with torch.no_grad(), ModuleTracker() as modules, _Refuse(modules, count, before) as looked:
            forward(tokens, positions)
        before = looked.seen


def check_rows(model: nn.Module, forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Marks tokens by embeddings that are no numbers, and looks where the marks get to.

    Args:
        model: with embeddings of at least two ids, whose weights are finite.
        forward: of `model`, as `check_operations` takes it, attention looking at no other token; returns logits
            (1, tokens, vocabulary).

    Raises:
        ValueError: a token gets to another's logits; names the module.
    """
    for table in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        table.weight.data[1] = torch.nan
    places = torch.arange(_TOKENS)
    # Of two tokens one is marked and the other is not, in some pass, for either of them.
    patterns = [places >> bit & 1 == value for bit in range(_TOKENS.bit_length()) for value in (0, 1)]
    for marks in patterns:
        spread: list[str] = []

        def look(name: str, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.shape[:2] == (1, _TOKENS):
                if not output[0].flatten(1).isfinite().all(dim=1)[~marks].all():
                    spread.append(name)

        tokens = marks.long()[None]
        with torch.no_grad():
            look("the model", forward(tokens, places[None]))
            if not spread:
                continue
            for name, module in model.named_modules():
                module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
            forward(tokens, places[None])
        raise ValueError(
            f"{(*spread[1:], *spread)[0]} carries tokens to the places of others: a row would depend on its "
            'neighbours, and on where the batch is cut; [parity] check = "off" runs it'
        )


def _arguments(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """By their names in the operation's schema, defaults too."""
    schema = func._schema.arguments
    given = {x.name: x.default_value for x in schema if x.has_default_value()}
    return given | dict(zip((x.name for x in schema), args)) | kwargs


def _refused(func: torch._ops.OpOverload, given: dict[str, Any], tokens: int) -> str | None:
    """None: it is known; else what is odd about its arguments, empty if it is not known with any."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    tensors = [x for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]
    if func.is_view or name in MOVES or not any(x.is_floating_point() or x.is_complex() for x in tensors):
        return None  # Whole numbers are exact.
    if odd := [x.dtype for x in tensors if x.dtype not in DTYPES and (x.is_floating_point() or x.is_complex())]:
        return f" in {odd[0]}"
    if name == "rsqrt":  # In bf16 it is rounded once in a vector, and twice in its tail.
        return None if tensors[0].dtype == torch.float32 else f" in {tensors[0].dtype}"
    if name in ELEMENTWISE:
        return f" with alpha = {given['alpha']}" if given.get("alpha", 1) != 1 else None
    if name == "pow":
        return None if given["exponent"] == 2 else f" with exponent {given['exponent']}"
    if name in PRODUCTS:
        return None if given[PRODUCTS[name]].shape[-1] % tokens else " over tokens"
    if name in ROWWISE:
        last = given.get("dim") in (-1, given["self"].ndim - 1, [-1], [given["self"].ndim - 1])
        return None if last and given["self"].shape[-1] % tokens else " over tokens"
    return ""


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
