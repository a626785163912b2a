# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Qwen3: dense and with experts, and the VLLM_COMPAT trainer that computes what vLLM's Qwen3ForCausalLM computes.

T counts the tokens of a packed batch, C is the model's width, H a number of heads, D the size of one.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ParallelStyle
from torchtitan.experiments.rl.unified.devices import device_of
from torchtitan.experiments.rl.unified.families.base import check_covered, Family, Geometry, OwnFields, required
from torchtitan.experiments.rl.unified.families.moe import check_moe, make_row_invariant
from torchtitan.experiments.rl.unified.families.tensor_parallel import dense_block_plan, heads_norm_plan
from torchtitan.experiments.rl.unified.families.vllm_arithmetic import (
    CompatLinear,
    CompatRMSNorm,
    fused_linear,
    PaddedOutput,
    rotary_kernel,
    Rotate,
    VOCAB_MULTIPLE,
)
from torchtitan.models.attention import VarlenMetadata
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.models.qwen3.model.model import Attention, FeedForward, Qwen3Model, TransformerBlock
from torchtitan.models.qwen3.model.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.protocols.train_spec import get_train_spec, TrainSpec

# A model that a laptop can train.
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "max_seq_len": 1024,
    "head_dim": 32,
    "dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "hidden_dim": 384,
    "qk_norm": True,
    "rope_theta": 10000,
    "enable_weight_tying": True,
}

# Hugging Face's config.json -> torchtitan's Qwen3ModelArgs
_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
}
_MOE_FIELDS = {"num_experts": "num_experts", "num_experts_per_tok": "top_k", "norm_topk_prob": "route_norm"}
# What torchtitan's Qwen3 has no switch for.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "rope_type": "default"}
_MOE_FIXED = {"decoder_sparse_step": 1, "mlp_only_layers": []}


class PolicyQwen3(Qwen3Model):
    """torchtitan's, with experts whose rows do not depend on their neighbours."""

    def __init__(self, model_args: Qwen3ModelArgs) -> None:
        super().__init__(model_args)
        make_row_invariant(self)


class Adapter(Qwen3StateDictAdapter):
    """torchtitan's, for experts that ranks share in any way that leaves each of them whole.

    Hugging Face's names have an expert a tensor: a rank that holds a part of the experts has the names of that part.
    """

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.shared = {name: value for name, value in state_dict.items() if _is_shared_experts(name, value)}
        state = super().to_hf({name: value for name, value in state_dict.items() if name not in self.shared})
        for name, value in self.shared.items():
            state |= zip(self._names(name, value), value.to_local(), strict=True)
        return state

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """What `to_hf` was given, if the values are its answer's; else a state of whole tensors."""
        rest, shared = dict(hf_state_dict), {}
        for name, value in getattr(self, "shared", {}).items():
            experts = [rest.pop(each) for each in self._names(name, value)]
            local = torch.stack(experts) if experts else value.to_local()
            layout = {"shape": value.shape, "stride": value.stride()}
            shared[name] = DTensor.from_local(local, value.device_mesh, value.placements, run_check=False, **layout)
        return super().from_hf(rest) | shared

    def _names(self, name: str, value: DTensor) -> list[str]:
        """Hugging Face's, of this rank's experts."""
        _, layer, kept = name.split(".", 2)
        (template,) = (hf for hf, titan in self.from_hf_map.items() if titan == f"layers.{{}}.{kept}")
        (count, *_), (first, *_) = compute_local_shape_and_global_offset(
            value.shape, value.device_mesh, value.placements
        )
        return [template.format(layer, expert) for expert in range(first, first + count)]


def _is_shared_experts(name: str, value: torch.Tensor) -> bool:
    return ".moe.experts." in name and isinstance(value, DTensor)


class Qwen3(Family):
    """Qwen3, dense and with experts."""

    name = "qwen3"
    model_types = ("qwen3", "qwen3_moe")
    own_fields = {
        "qwen3_moe": OwnFields(
            sizes=("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
            others=("norm_topk_prob", "mlp_only_layers"),
        )
    }

    def upstream_spec(self) -> TrainSpec:
        spec = get_train_spec("qwen3")
        flavors = copy.deepcopy(dict(spec.model_args))
        flavors["tiny"] = replace(flavors["debugmodel"], **TINY)
        for args in flavors.values():
            # Nobody balances experts here: a policy is what its checkpoint says.
            args.moe_args = replace(args.moe_args, load_balance_coeff=None, use_grouped_mm=False)
        return replace(spec, model_cls=PolicyQwen3, model_args=flavors, state_dict_adapter=Adapter)

    def from_hf(self, config: Mapping[str, Any]) -> Qwen3ModelArgs:
        check_covered(config, _FIXED, self.name)
        args: dict[str, Any] = dict(zip(_FIELDS.values(), required(config, *_FIELDS), strict=True))
        args["enable_weight_tying"] = bool(config.get("tie_word_embeddings"))
        if config.get("max_position_embeddings"):
            args["max_seq_len"] = config["max_position_embeddings"]
        if config["model_type"] == "qwen3":
            (args["hidden_dim"],) = required(config, "intermediate_size")
            return Qwen3ModelArgs(**args)
        check_covered(config, _MOE_FIXED, self.name)
        config = {"num_experts": config.get("num_local_experts"), **config}  # transformers 5 has another name.
        moe = dict(zip(_MOE_FIELDS.values(), required(config, *_MOE_FIELDS), strict=True))
        experts = MoEArgs(
            **moe,
            num_shared_experts=0,
            score_func="softmax",
            score_before_experts=False,
            load_balance_coeff=None,
            use_grouped_mm=False,
        )
        (inner,) = required(config, "moe_intermediate_size")
        return Qwen3ModelArgs(**args, moe_enabled=True, moe_inter_dim=inner, moe_args=experts)

    def to_hf(self, args: Qwen3ModelArgs) -> dict[str, Any]:
        fields = {field: getattr(args, name) for field, name in _FIELDS.items()}
        fields["tie_word_embeddings"] = args.enable_weight_tying
        if not args.moe_enabled:
            return fields | {"model_type": "qwen3", "intermediate_size": args.hidden_dim}
        fields |= {field: getattr(args.moe_args, name) for field, name in _MOE_FIELDS.items()}
        return fields | {"model_type": "qwen3_moe", "moe_intermediate_size": args.moe_inter_dim}

    def geometry(self, args: Qwen3ModelArgs) -> Geometry:
        hidden = args.moe_args.top_k * args.moe_inter_dim if args.moe_enabled else args.hidden_dim
        return Geometry(
            args.n_layers,
            args.dim,
            args.vocab_size,
            args.n_heads,
            args.n_kv_heads,
            args.head_dim,
            hidden,
            routed=args.moe_enabled,
        )

    def check_parallel(self, args: Qwen3ModelArgs, tensor_parallel_degree: int) -> None:
        super().check_parallel(args, tensor_parallel_degree)
        if args.moe_enabled:
            check_moe(args.moe_args)
            if tensor_parallel_degree > 1:
                raise ValueError(
                    f"tensor_parallel_degree = {tensor_parallel_degree}: a mixture of experts is not spread over ranks "
                    "here; use 1, or FSDP"
                )

    def tensor_parallel_plan(self, model: nn.Module) -> dict[str, ParallelStyle]:
        return dense_block_plan(model) | heads_norm_plan(model)

    def to_vllm_arithmetic(self, model: nn.Module, tensor_parallel_degree: int = 1) -> nn.Module:
        return to_compat(model, tensor_parallel_degree)


def to_compat(model: Qwen3Model, tensor_parallel_degree: int = 1) -> Qwen3Model:
    """Gives the modules of `model` vLLM's arithmetic, in place; parameters, names and the state dict stay.

    Call it before the model is parallelized. It may be on the meta device. Imports vLLM's kernels, not its engine.

    Args:
        model: TorchTitan's, with `attn_type` "varlen".
        tensor_parallel_degree: ranks that will share it.

    Returns:
        The same model. Its forward takes `tokens` (1, T), `attention_masks` (VarlenMetadata) and `positions` (1, T)
        and returns logits (1, T, vocabulary), as before.

    Raises:
        ValueError: `model` is not a dense Qwen3 with normalized queries and keys, or its vocabulary cannot be shared.
    """
    odd = type(model).__name__
    if type(model) is PolicyQwen3:
        args = model.model_args
        odd = "one with experts" if args.moe_enabled else "" if args.qk_norm else "one without those norms"
    if odd:
        raise ValueError(
            f'[rl] mode = "vllm_compat" knows the dense Qwen3 with normalized queries and keys only, not {odd}; '
            'mode = "unified" runs any TrainSpec\'s model'
        )
    rotary_kernel()
    for module in list(model.modules()):
        module.__class__ = _COMPAT.get(type(module), type(module))
    if model.vocab_size % VOCAB_MULTIPLE:
        if tensor_parallel_degree > 1:
            raise ValueError(
                f'tensor parallelism in [rl] mode = "vllm_compat" wants a vocabulary that is a multiple of '
                f'{VOCAB_MULTIPLE}, this has {model.vocab_size} tokens; use mode = "unified" or no tensor parallelism'
            )
        model.output.__class__ = PaddedOutput
    return model


class CompatModel(Qwen3Model):
    """vLLM's Qwen3Model and output projection."""

    def forward(self, tokens: torch.Tensor, attention_masks: VarlenMetadata, positions: torch.Tensor) -> torch.Tensor:
        """Logits (1, T, vocabulary) of `tokens` (1, T) at `positions` (1, T) in their sequences."""
        hidden_TC, residual_TC = self.tok_embeddings(tokens).flatten(0, 1), None
        cos, _, sin, _ = self.rope_cache[positions.flatten()].to(hidden_TC.dtype).chunk(4, dim=-1)
        rope_TD = torch.cat((cos, sin), dim=-1)
        for layer in self.layers.values():
            hidden_TC, residual_TC = layer(hidden_TC, residual_TC, rope_TD, attention_masks)
        hidden_TC, _ = self.norm(hidden_TC, residual_TC)
        return self.output(hidden_TC).unflatten(0, tokens.shape)


class CompatBlock(TransformerBlock):
    """vLLM's Qwen3DecoderLayer."""

    def forward(
        self,
        hidden_TC: torch.Tensor,
        residual_TC: torch.Tensor | None,
        rope_TD: torch.Tensor,
        attention_masks: VarlenMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, not yet added to the residual stream, and the stream; `residual_TC` None: starts it."""
        hidden_TC, residual_TC = self.attention_norm(hidden_TC, residual_TC)
        hidden_TC = self.attention(hidden_TC, rope_TD, attention_masks)
        hidden_TC, residual_TC = self.ffn_norm(hidden_TC, residual_TC)
        return self.feed_forward(hidden_TC), residual_TC


class CompatAttention(Attention):
    """vLLM's Qwen3Attention."""

    def forward(self, hidden_TC: torch.Tensor, rope_TD: torch.Tensor, attention_masks: VarlenMetadata) -> torch.Tensor:
        """Attention output (T, C)."""
        projections = self.wq, self.wk, self.wv
        xq, xk, xv = (x.unflatten(-1, (-1, self.head_dim)) for x in fused_linear(hidden_TC, projections))
        xq, xk = Rotate.apply(self.q_norm(xq)[0], rope_TD), Rotate.apply(self.k_norm(xk)[0], rope_TD)
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (xq, xk, xv))
        return self.wo(self.inner_attention(*heads_first, attention_masks, scale=self.scaling).flatten(1))


class CompatFeedForward(FeedForward):
    """vLLM's Qwen2MLP."""

    def forward(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Output (T, C)."""
        gate, up = fused_linear(hidden_TC, (self.w1, self.w3))
        return self.w2(device_of(gate).vllm_silu_and_mul(gate, up))


_COMPAT: dict[type, type] = {
    PolicyQwen3: CompatModel,
    TransformerBlock: CompatBlock,
    Attention: CompatAttention,
    FeedForward: CompatFeedForward,
    nn.RMSNorm: CompatRMSNorm,
    nn.Linear: CompatLinear,
}

FAMILY = Qwen3()
