# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The models this project runs: torchtitan's TrainSpecs, with a flavor that a laptop can train."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from torchtitan.protocols import train_spec as registry
from torchtitan.protocols.model import BaseModelArgs

TINY_QWEN3: dict[str, Any] = {
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
CONFIG_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "enable_weight_tying",
}
# What torchtitan's Qwen3 has no switch for; a config.json may leave these out.
FIXED_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_scaling": None,
    "rope_type": "default",
}


def register_train_specs() -> None:
    """Register torchtitan's Qwen3 spec, under its own name, with the flavor "tiny" added.

    Every flavor of torchtitan's is there too. Calling it again changes nothing.
    """
    spec = registry.get_train_spec("qwen3")
    if "tiny" in spec.model_args:
        return
    # Own copies: the trainer writes its sequence length into the arguments that it is given.
    flavors = copy.deepcopy(dict(spec.model_args))
    flavors["tiny"] = dataclasses.replace(flavors["debugmodel"], **TINY_QWEN3)
    registry.register_train_spec("qwen3", dataclasses.replace(spec, model_args=flavors))


def hf_config(model_args: BaseModelArgs) -> dict[str, Any]:
    """The fields of a Hugging Face ``config.json`` that follow from a Qwen3 flavor's ``model_args``."""
    return {field: getattr(model_args, name) for field, name in CONFIG_FIELDS.items()}


def check_checkpoint_fits(config_json_path: str | Path, model_args: BaseModelArgs) -> None:
    """Check that a checkpoint has the shapes and constants of a flavor.

    Args:
        config_json_path: The checkpoint's ``config.json`` in Hugging Face layout.
        model_args: The flavor's, a ``Qwen3ModelArgs``.

    Raises:
        ValueError: The file is not there or not JSON, or fields are missing or differ: it names
            each field with the checkpoint's value and the flavor's.
    """
    path = Path(config_json_path)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"No checkpoint here: {path} does not exist.") from None
    except ValueError as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    # transformers 5 writes rope_theta and rope_type into rope_parameters
    config = {**FIXED_FIELDS, "tie_word_embeddings": False, **(config.get("rope_parameters") or {}), **config}
    differences = [
        f"{field}: {config.get(field, 'missing')} in the checkpoint, {expected} in the flavor"
        for field, expected in {**hf_config(model_args), **FIXED_FIELDS}.items()
        if config.get(field, "missing") != expected
    ]
    if differences:
        raise ValueError(f"{path} does not fit the model flavor: {'; '.join(differences)}.")
