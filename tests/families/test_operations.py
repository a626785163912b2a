# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Operations of a model, looked at as torch dispatches them: those of every family are known, another is named."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchtitan.experiments.rl.unified.families import family, PolicyModel
from torchtitan.experiments.rl.unified.families.llama3 import Llama3
from torchtitan.experiments.rl.unified.preflight.model import check_forward
from torchtitan.models.llama3.model import model as upstream

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "flavor"), [("llama3", "8B"), ("qwen3", "0.6B"), ("qwen3", "14B"), ("qwen3", "debugmodel_moe")]
)
def test_those_of_the_families_are_known(name, flavor, dtype):
    found = family(name)
    check_forward(PolicyModel(found, found.train_spec().model_args[flavor]), dtype)


class Extra(nn.Module):
    """A module of torchtitan's feed-forward with one more operation on its output (1, tokens, width)."""

    def __init__(self, inner: nn.Module, operation) -> None:
        super().__init__()
        self.inner, self.operation = inner, operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(self.inner(x))


def model_with(operation) -> PolicyModel:
    """Llama 3 whose second layer's feed-forward has one more operation."""

    class Model(Llama3().upstream_spec().model_cls):
        def __init__(self, args) -> None:
            super().__init__(args)
            self.layers["1"].feed_forward = Extra(self.layers["1"].feed_forward, operation)

    class Changed(Llama3):
        def upstream_spec(self):
            return dataclasses.replace(super().upstream_spec(), model_cls=Model)

    return PolicyModel(Changed(), Changed().train_spec().model_args["debugmodel"])


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        (lambda x: x - x.mean(dim=(0, 1)), r"aten.mean.dim in Model.layers.1.feed_forward over tokens"),
        (lambda x: F.batch_norm(x[0], None, None, training=True)[None], r"aten.native_batch_norm.default"),
        (lambda x: x / x.std(), r"aten.std.correction"),
        (lambda x: x.cumsum(1), r"aten.cumsum.default"),
        (lambda x: x.roll(1, 1), r"aten.roll.default"),
        (lambda x: x.transpose(1, 2).softmax(-1).transpose(1, 2), r"aten._softmax.default .* over tokens"),
        (lambda x: (x @ x.mT) @ x, r"aten.(bmm|mm).default .* over tokens"),
        (lambda x: x - x.mean(), r"aten.mean.default"),
        (lambda x: F.gelu(x), r"aten.gelu.default"),
        (lambda x: x**1.5, r"aten.pow.Tensor_Scalar .* with exponent 1.5"),
        (lambda x: F.layer_norm(x, x.shape[-1:]), r"aten.native_layer_norm.default"),
        (lambda x: x.half().float().to(x.dtype) + x.half().mul(2), r"aten.mul.Tensor .* in torch.float16"),
        (lambda x: x.bfloat16().abs().rsqrt().to(x.dtype), r"aten.rsqrt.default .* in torch.bfloat16"),
        (lambda x: torch.add(x, x, alpha=0.5), r"aten.add.Tensor .* with alpha = 0.5"),
        (lambda x: x / x.shape[1], r"aten.div.Tensor in Model.layers.1.feed_forward with a number that depends on how"),
        (lambda x: sum(x[:, i : i + 1] for i in range(x.shape[1])) + x, r"aten.* where another number of tokens has"),
        (lambda x: x.masked_fill(x > 0, x.shape[1]), r"aten.masked_fill.Scalar .* with a number that depends on how"),
        (lambda x: x * torch.full((1,), x.shape[1]), r"aten.full.default .* with a number that depends on how many"),
    ],
)
def test_another_is_refused_by_its_name_and_module(operation, named):
    with pytest.raises(ValueError, match=named + r'.*\[parity\] check = "off" runs it'):
        check_forward(model_with(operation), torch.float32)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.cat((x[:, 1:], x[:, :1]), 1),
        lambda x: torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1),
        lambda x: x + x[:, -1:],
        lambda x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)),
        lambda x: x.gather(1, (torch.arange(x.shape[1]) // 2)[None, :, None].expand_as(x)),
        lambda x: torch.cat((x[:, :7], x[:, 8:9], x[:, 7:8], x[:, 9:]), 1),
    ],
)
def test_a_move_from_token_to_token_is_refused_by_its_module(operation):
    with pytest.raises(ValueError, match=r'layers.1.feed_forward.* to the places of others: .*check = "off" runs it'):
        check_forward(model_with(operation), torch.float32)


def test_what_neither_mixes_nor_rounds_twice_is_not_refused():
    check_forward(model_with(lambda x: (x * 2 - x.abs()).relu() / 3), torch.float32)


def test_rope_in_complex_numbers_is_refused():
    class Upstream(Llama3):
        def upstream_spec(self):
            return dataclasses.replace(super().upstream_spec(), model_cls=upstream.Transformer)

    model = PolicyModel(Upstream(), Upstream().train_spec().model_args["debugmodel"])
    with pytest.raises(ValueError, match=r"aten.mul.Tensor in Transformer.layers.0.attention in torch.complex64"):
        check_forward(model, torch.float32)
