# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A checkpoint's config.json, as transformers reads it: each field is used, known to be without effect, or refused."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchtitan.experiments.rl.unified.config.checkpoint_path import read_json
from torchtitan.experiments.rl.unified.families.base import Family, OwnFields
from torchtitan.experiments.rl.unified.families.files import check_directory

__all__ = ["read_config"]

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# No model has more; what has would be built for hours.
_MOST, _MOST_LAYERS = 2**24, 2**12
# Without these transformers would take another model's.
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_USED = ("model_type", "rms_norm_eps", "tie_word_embeddings", "dtype", "eos_token_id")
# Looked at on their own below.
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
# The only value that models here have; a config may leave them out.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "use_mrope": False,
    "per_layer_config": None,
    "auto_map": None,
    "quantization_config": None,
    "compression_config": None,
}
_WHY = {
    "quantization_config": "a policy that is updated in place cannot be quantised: take the unquantised checkpoint",
    "auto_map": "the checkpoint brings code of its own, which is not run",
}
# They change neither the weights nor what the model computes from them: training, output classes, bookkeeping.
_WITHOUT_EFFECT = {
    "transformers_version",
    "architectures",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "initializer_range",
    "attention_dropout",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "chunk_size_feed_forward",
    "pretraining_tp",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "tokenizer_class",
    "task_specific_params",
    "bos_token_id",
    "max_window_layers",
    "sliding_window",
    "layer_types",
    "output_router_logits",
    "router_aux_loss_coef",
    "attn_implementation",
    "_attn_implementation_autoset",
    "unsloth_fixed",
    "unsloth_version",
}


def read_config(path: str | Path, model_types: Mapping[str, Family]) -> dict[str, Any]:
    """The fields of `path`/config.json that make the model, with transformers' defaults for those it leaves out.

    Args:
        path: the checkpoint directory.
        model_types: that can be run here, each with its family.

    Returns:
        config.json's names and transformers' values; `dtype` as torch's (None if nothing says it), `eos_token_id` as a
        list, and of RoPE at the top `rope_theta`, `rope_type` and `rope_scaling` (None where RoPE is not scaled).

    Raises:
        ValueError: one line: there is no such directory or config.json, or which field is missing, odd, or has no
            counterpart here.
    """
    check_directory(Path(path))
    file = Path(path) / "config.json"
    try:
        raw = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"No checkpoint here: {file} does not exist.") from None
    model_type, known = raw.get("model_type"), sorted(model_types)
    if model_type not in known:
        raise ValueError(
            f"{file} is of model_type {model_type!r}, which no family here has; there are: {', '.join(known)}"
        )
    try:
        if missing := [name for name in _NEEDED if raw.get(name) is None]:
            raise ValueError(f"it lacks {', '.join(missing)}: is it complete?")
        own = model_types[model_type].own_fields.get(model_type, OwnFields())
        for name in (name for name in raw if name in (*_SIZES, *own.sizes)):
            most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
            if isinstance(raw[name], (int, float)) and raw[name] > most:
                raise ValueError(f"{name} = {_short(raw[name])}: no model has more than {most}")
        return _checked(raw, _through_transformers(path), own)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _through_transformers(path: str | Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    # It checks types here and there, and by errors of many classes.
    except Exception as error:
        raise ValueError(
            f"transformers does not read it: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        ) from None


def _checked(raw: dict[str, Any], config: Any, own: OwnFields) -> dict[str, Any]:
    """The fields that are used, each held against what it can be."""
    from transformers import GenerationConfig

    kind, sizes, used = raw["model_type"], _SIZES + own.sizes, _USED + own.others
    # transformers leaves sampling settings in a config.json unread, and so does vLLM as it is started here.
    known = {*sizes, *used, "torch_dtype", "pad_token_id", "num_local_experts", *_ROPE, *_FIXED, *_WITHOUT_EFFECT}
    known |= {*GenerationConfig._get_default_generation_params()}
    if unknown := sorted(name for name, value in raw.items() if name not in known and value is not None):
        raise ValueError(
            f"{', '.join(unknown)}: models here have no such feature; if it has no effect, delete it there"
        )
    for name, value in _FIXED.items():
        if (found := raw.get(name)) is not None and found != value:
            reason = _WHY.get(name, f"models of type {kind} here have {value!r}")
            raise ValueError(f"{name} = {_short(found)}: {reason}")
    if odd := [each for each in getattr(config, "layer_types", None) or [] if each != "full_attention"]:
        raise ValueError(f"layer_types has {odd[0]!r}: every layer here attends to all that came before")
    fields = {name: getattr(config, name) for name in sizes + used if hasattr(config, name)}
    for name in sizes:
        # Llama 2 and older configs leave it to transformers, which leaves that of experts to the model.
        if fields.get(name) is None and name == "head_dim":
            fields[name] = fields["hidden_size"] // fields["num_attention_heads"]
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"{name} = {_short(fields[name])}: it must be a whole number from 1 on")
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        raise ValueError(
            f"num_key_value_heads = {fields['num_key_value_heads']} does not divide num_attention_heads = "
            f"{fields['num_attention_heads']}"
        )
    fields["rms_norm_eps"] = _positive("rms_norm_eps", fields["rms_norm_eps"])
    if fields["dtype"] is not None and fields["dtype"] not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype = {fields['dtype']}: policies are float32, bfloat16 or float16")
    if type(fields["tie_word_embeddings"]) is not bool:
        raise ValueError(f"tie_word_embeddings = {_short(fields['tie_word_embeddings'])}: it must be true or false")
    fields["eos_token_id"] = _ids("eos_token_id", fields["eos_token_id"], fields["vocab_size"])
    if (pad := config.pad_token_id) is not None and pad >= fields["vocab_size"]:
        raise ValueError(f"pad_token_id = {pad}: the vocabulary has {fields['vocab_size']} tokens")
    if "num_experts" in fields:
        _check_experts(fields)
    return fields | _rope(raw, config.rope_parameters, own)


def _rope(raw: dict[str, Any], rope: dict[str, Any], own: OwnFields) -> dict[str, Any]:
    """`rope_theta`, `rope_type` and `rope_scaling` of transformers' rope_parameters."""
    given = [raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError("rope_parameters and rope_scaling differ: delete the one that is not meant")
    kind, scalings = rope["rope_type"], {"default": (), **own.rope_scalings}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters differ by layer: models here have one RoPE")
    if kind not in scalings or rope.get("type", kind) != kind:
        kinds = " and ".join(dict.fromkeys(str(each) for each in (kind, rope.get("type", kind))))
        raise ValueError(f"RoPE of type {kinds}: models of type {raw['model_type']} here have {' and '.join(scalings)}")
    keys = scalings[kind]
    allowed = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings", *keys}
    if unknown := sorted(name for name, value in rope.items() if name not in allowed and value is not None):
        raise ValueError(f"{', '.join(unknown)} of RoPE: type {kind} has no such parameter")
    if (part := rope.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"partial_rotary_factor = {_short(part)}: models here turn whole heads")
    scaling = {name: _positive(f"{name} of RoPE", rope.get(name)) for name in keys}
    return {
        "rope_theta": _positive("rope_theta", rope["rope_theta"]),
        "rope_type": kind,
        "rope_scaling": {"rope_type": kind, **scaling} if keys else None,
    }


def _check_experts(fields: dict[str, Any]) -> None:
    if fields["num_experts_per_tok"] > fields["num_experts"]:
        raise ValueError(
            f"num_experts_per_tok = {fields['num_experts_per_tok']} of num_experts = {fields['num_experts']}"
        )
    if type(fields["norm_topk_prob"]) is not bool:
        raise ValueError(f"norm_topk_prob = {_short(fields['norm_topk_prob'])}: it must be true or false")
    _ids("mlp_only_layers", fields["mlp_only_layers"], fields["num_hidden_layers"])


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} = {_short(value)}: it must be a number above 0")
    return value


def _ids(name: str, value: Any, count: int) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if odd := [each for each in ids if type(each) is not int or not 0 <= each < count]:
        raise ValueError(f"{name} = {_short(odd[0])}: it must be from 0 to {count - 1}")
    return ids


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
