# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Llama 3, and what shares its architecture (SmolLM2)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchtitan.experiments.rl.unified.families.base import check_covered, Family, Geometry, OwnFields, required
from torchtitan.models.attention import VarlenMetadata
from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs
from torchtitan.models.llama3.model.model import Attention, Transformer
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.train_spec import get_train_spec, TrainSpec

# Hugging Face's config.json -> torchtitan's TransformerModelArgs
_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
}
_SCALING = {
    "factor": "scaling_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
# What torchtitan's Llama 3 has no switch for.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
# torchtitan scales always. No wave is so long that these would change it.
_UNSCALED = RoPEScalingArgs(scaling_factor=1.0, original_max_position_embeddings=1 << 60)


@dataclass
class Llama3Args(TransformerModelArgs):
    """torchtitan's, with one weight for both ends where the checkpoint has one."""

    enable_weight_tying: bool = False


class PolicyLlama3(Transformer):
    """torchtitan's Transformer: ends that may share their weight, RoPE in real numbers."""

    def __init__(self, model_args: TransformerModelArgs) -> None:
        super().__init__(model_args)
        self._tie()
        for layer in self.layers.values():
            layer.attention.__class__ = RealAttention

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        self._tie()  # On the meta device the tie may have been lost.

    def _tie(self) -> None:
        if getattr(self.model_args, "enable_weight_tying", False):
            self.output.weight = self.tok_embeddings.weight


class RealAttention(Attention):
    """torchtitan's Attention with the same rotation, by additions and products of real numbers.

    torch multiplies complex numbers by another formula in a vector's tail: a row's bits would depend on where threads
    divide the batch.
    """

    def forward(
        self,
        x: torch.Tensor,
        freqs_cis: torch.Tensor,
        attention_masks: VarlenMetadata,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Output (1, tokens, width) of `x` (1, tokens, width) at `positions` (1, tokens)."""
        xq, xk, xv = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        angles = torch.view_as_real(freqs_cis)[positions[0]][None, :, None]
        xq, xk = rotate(xq, angles), rotate(xk, angles)
        heads_first = (x.transpose(1, 2) for x in (xq, xk, xv))
        return self.wo(self.inner_attention(*heads_first, attention_masks).view(*x.shape[:2], -1))


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of the last dimension, in fp32.

    Args:
        x: (1, tokens, heads, head size).
        angles: (1, tokens, 1, head size / 2, 2), cosine and sine.

    Source: RoFormer, arXiv:2104.09864, eq. 34.
    """
    one, other = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.unbind(-1)
    return torch.stack((one * cos - other * sin, one * sin + other * cos), dim=-1).flatten(-2).type_as(x)


class Adapter(Llama3StateDictAdapter):
    """torchtitan's, for ends that share their weight: Hugging Face's names have it once."""

    @property
    def tied(self) -> bool:
        return getattr(self.model_args, "enable_weight_tying", False)

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return super().to_hf({k: v for k, v in state_dict.items() if not (self.tied and k == "output.weight")})

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = super().from_hf({k: v for k, v in hf_state_dict.items() if not k.endswith("rotary_emb.inv_freq")})
        if self.tied:
            state_dict.setdefault("output.weight", state_dict["tok_embeddings.weight"])
        return state_dict


class Llama3(Family):
    """Llama 3 to 3.3."""

    name = "llama3"
    model_types = ("llama",)
    own_fields = {"llama": OwnFields(rope_scalings={"llama3": tuple(_SCALING)})}

    def upstream_spec(self) -> TrainSpec:
        spec = get_train_spec("llama3")
        flavors = {
            name: args
            for name, args in copy.deepcopy(dict(spec.model_args)).items()
            if getattr(args, "attn_type", "") == "sdpa"
        }
        return replace(spec, model_cls=PolicyLlama3, model_args=flavors, state_dict_adapter=Adapter)

    def from_hf(self, config: Mapping[str, Any]) -> Llama3Args:
        check_covered(config, _FIXED, self.name)
        args: dict[str, Any] = dict(zip(_FIELDS.values(), required(config, *_FIELDS), strict=True))
        width, heads = args["dim"], args["n_heads"]
        check_covered(config, {"head_dim": width // heads}, self.name)
        (hidden,) = required(config, "intermediate_size")
        if config.get("max_position_embeddings"):
            args["max_seq_len"] = config["max_position_embeddings"]
        return Llama3Args(
            **args,
            n_kv_heads=config.get("num_key_value_heads") or heads,
            # torchtitan rounds some width (this: 1 or 2) up to a multiple, which is then the one that is meant.
            ffn_dim_multiplier=1 / width,
            multiple_of=hidden,
            rope_scaling_args=_scaling(config.get("rope_scaling")),
            enable_weight_tying=bool(config.get("tie_word_embeddings")),
        )

    def to_hf(self, args: TransformerModelArgs) -> dict[str, Any]:
        fields = {field: getattr(args, name) for field, name in _FIELDS.items()}
        scaling = args.rope_scaling_args
        scaled = {"rope_type": "llama3"} | {field: getattr(scaling, name) for field, name in _SCALING.items()}
        return fields | {
            "model_type": "llama",
            "num_key_value_heads": args.n_kv_heads or args.n_heads,
            "intermediate_size": _hidden(args),
            "tie_word_embeddings": getattr(args, "enable_weight_tying", False),
            "rope_scaling": None if scaling == _UNSCALED else scaled,
        }

    def geometry(self, args: TransformerModelArgs) -> Geometry:
        kv_heads = args.n_kv_heads or args.n_heads
        head_size = args.dim // args.n_heads
        return Geometry(args.n_layers, args.dim, args.vocab_size, args.n_heads, kv_heads, head_size, _hidden(args))


def _scaling(rope_scaling: Mapping[str, Any] | None) -> RoPEScalingArgs:
    if rope_scaling is None:
        return _UNSCALED
    kind = rope_scaling.get("rope_type", rope_scaling.get("type"))
    if kind != "llama3":
        raise ValueError(f'config.json scales RoPE by {kind!r}: llama3 models here know "llama3" and none')
    args = dict(zip(_SCALING.values(), required(rope_scaling, *_SCALING), strict=True))
    low, high = args["low_freq_factor"], args["high_freq_factor"]
    if not low < high:
        raise ValueError(
            f"config.json scales RoPE with low_freq_factor = {low} and high_freq_factor = {high}: the first must be "
            "below the second"
        )
    return RoPEScalingArgs(**args)


def _hidden(args: TransformerModelArgs) -> int:
    """Width inside the MLP, as torchtitan's FeedForward has it."""
    hidden = int(2 * 4 * args.dim / 3)
    if args.ffn_dim_multiplier is not None:
        hidden = int(args.ffn_dim_multiplier * hidden)
    return args.multiple_of * -(-hidden // args.multiple_of)


FAMILY = Llama3()
