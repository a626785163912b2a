# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a model family is, and a model of one: all that the rest of the package knows of models."""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torchtitan.experiments.rl.unified.families.tensor_parallel import dense_block_plan, shard_over
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model.

    Attributes:
        layers, width, vocabulary: of the whole model.
        heads, kv_heads, head_size: of its attention.
        hidden: width inside an MLP, of all the experts that a token visits.
        routed: a token visits some of many experts.
    """

    layers: int
    width: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    routed: bool = False


# What the fields of config.json that only size a model are set to in one to look at.
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@dataclass(frozen=True)
class OwnFields:
    """What the config.json of a model_type has, and not that of every other.

    Attributes:
        sizes: whole numbers from 1 on.
        others: fields of other kinds.
        rope_scalings: how its RoPE may be scaled -> the parameters that say how far.
    """

    sizes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    rope_scalings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Family(ABC):
    """Models of one architecture: a file of this package with a FAMILY.

    The defaults are those of TorchTitan's decoder-only models: `tok_embeddings`, `layers` of `attention_norm`,
    `attention` (`wq`, `wk`, `wv`, `inner_attention`, `wo`), `ffn_norm`, `feed_forward` (`w1`, `w2`, `w3`), then `norm`
    and `output`.

    A family whose generator in VLLM_COMPAT is vLLM's own has a second file, `<name>_vllm.py`, with a class
    `VllmPolicyForCausalLM`; it imports vLLM.

    Attributes:
        name: of the TrainSpec, and of the file.
        model_types: in config.json.
        own_fields: of a model_type that has some.
    """

    name: str
    model_types: tuple[str, ...]
    own_fields: Mapping[str, OwnFields] = {}

    @abstractmethod
    def upstream_spec(self) -> TrainSpec:
        """torchtitan's TrainSpec, with what must differ here."""

    @abstractmethod
    def from_hf(self, config: Mapping[str, Any]) -> BaseModelArgs:
        """Model args of what config.json says.

        Args:
            config: with `rope_theta`, `rope_type` and `rope_scaling` (None where RoPE is not scaled) at the top.

        Raises:
            ValueError: names the fields that the family does not cover.
        """

    @abstractmethod
    def to_hf(self, args: BaseModelArgs) -> dict[str, Any]:
        """What config.json says of a model with these args, in the terms of `from_hf`."""

    @abstractmethod
    def geometry(self, args: BaseModelArgs) -> Geometry:
        """Sizes of a model with these args."""

    def train_spec(self) -> TrainSpec:
        """The TrainSpec as it runs here: packed sequences, and model args of its own to change."""
        spec = self.upstream_spec()
        flavors = copy.deepcopy(dict(spec.model_args))
        return dataclasses.replace(spec, model_args={name: packed(args) for name, args in flavors.items()})

    def small(self, args: BaseModelArgs) -> BaseModelArgs:
        """Args of a model of the same operations, layers and experts, but narrow: it is built and run in no time."""
        fields = self.to_hf(args)
        return packed(self.from_hf(fields | {name: size for name, size in _SMALL.items() if name in fields}))

    def check_parallel(self, args: BaseModelArgs, tensor_parallel_degree: int) -> None:
        """Raises ValueError if a model with these args cannot be spread over so many ranks."""
        sizes = self.geometry(args)
        if sizes.heads % tensor_parallel_degree or sizes.kv_heads % tensor_parallel_degree:
            raise ValueError(
                f"tensor_parallel_degree = {tensor_parallel_degree} does not divide the model's {sizes.heads} heads "
                f"and {sizes.kv_heads} key/value heads"
            )

    def tensor_parallel_plan(self, model: nn.Module) -> dict[str, ParallelStyle]:
        """How each layer's modules are sharded, by their names in the layer."""
        return dense_block_plan(model)

    def apply_tensor_parallel(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Shards the model over `mesh`, in place, the same in trainer and generator."""
        shard_over(model, mesh, self.tensor_parallel_plan(model))

    def fsdp_groups(self, model: nn.Module) -> list[nn.Module | list[nn.Module]]:
        """What FSDP gathers together; tied weights must lie in one group."""
        return [*model.layers.values(), [model.tok_embeddings, model.norm, model.output]]

    def replace_attention(self, model: nn.Module, make: Callable[[str], nn.Module]) -> None:
        """Puts `make(name)` in the place of every module that attends; name is its path in `model`."""
        replace_inner_attention(model, make)

    def to_vllm_arithmetic(self, model: nn.Module, tensor_parallel_degree: int = 1) -> nn.Module:
        """Gives the model the arithmetic of vLLM's own, in place; ValueError where the family has no such pair."""
        raise ValueError(
            f'[rl] mode = "vllm_compat" has no pair for {self.name} models; mode = "unified" runs them on both sides'
        )


@dataclass(frozen=True)
class PolicyModel:
    """A model that a job runs.

    Attributes:
        family: whose model it is.
        args: torchtitan's, of this model.
        flavor: torchtitan's name for these args; empty: they are the checkpoint's own.
    """

    family: Family
    args: BaseModelArgs
    flavor: str = ""

    @property
    def geometry(self) -> Geometry:
        return self.family.geometry(self.args)

    def train_spec(self) -> TrainSpec:
        """With these args under `flavor`."""
        return dataclasses.replace(self.family.train_spec(), model_args={self.flavor: copy.deepcopy(self.args)})

    def build(self, max_seq_len: int | None = None) -> nn.Module:
        """The model, on the current default device and in the default dtype."""
        args = copy.deepcopy(self.args)
        args.max_seq_len = max_seq_len or args.max_seq_len
        return self.family.train_spec().model_cls(args)


def check_covered(config: Mapping[str, Any], fixed: Mapping[str, Any], family: str) -> None:
    """Raises ValueError naming fields of `config` that are there and not as `fixed` has them."""
    odd = [
        f"{name} = {config[name]!r}"
        for name, value in fixed.items()
        if config.get(name) is not None and config[name] != value
    ]
    if odd:
        raise ValueError(f"config.json has {', '.join(odd)}: {family} models here have no such feature")


def required(config: Mapping[str, Any], *names: str) -> list[Any]:
    """The fields' values; ValueError names those that are missing."""
    if missing := [name for name in names if config.get(name) is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}: is it complete?")
    return [config[name] for name in names]


def replace_inner_attention(model: nn.Module, make: Callable[[str], nn.Module]) -> None:
    """Puts `make(name)` in the place of every module called `inner_attention`; name is its path in `model`.

    Raises:
        ValueError: if the model has no such module.
    """
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] == "inner_attention"]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no module called inner_attention: its attention cannot be replaced"
        )
    for name in names:
        model.set_submodule(name, make(name))


def packed(args: BaseModelArgs) -> BaseModelArgs:
    """The args with attention inside packed sequences, in place; ValueError where the model has none."""
    if not hasattr(args, "attn_type"):
        raise ValueError(f"{type(args).__name__} has no attn_type: its attention cannot run on packed sequences")
    args.attn_type, args.attn_mask_type = "varlen", "block_causal"
    return args
