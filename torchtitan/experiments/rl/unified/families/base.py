# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A TrainSpec as this experiment runs it."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torchtitan.experiments.rl.unified.families.qwen3 import CONFIG_FIELDS, TINY_QWEN3
from torchtitan.protocols import train_spec as registry
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec, TrainSpec


def policy_train_spec(name: str) -> TrainSpec:
    """The TrainSpec called `name`, with variable-length attention and model args of its own to change.

    Raises:
        ValueError: if no TrainSpec has that name, or its model has no variable-length attention.
    """
    register_train_specs()
    spec = get_train_spec(name)
    model_args = copy.deepcopy(dict(spec.model_args))
    for flavor, args in model_args.items():
        if not hasattr(args, "attn_type"):
            raise ValueError(f"model {name} {flavor} has no attn_type: its attention cannot run on packed sequences")
        args.attn_type, args.attn_mask_type = "varlen", "block_causal"
    return dataclasses.replace(spec, model_args=model_args)


def flavor_of_checkpoint(name: str, checkpoint: str) -> tuple[str, BaseModelArgs]:
    """The flavor of TrainSpec `name` that the checkpoint's config.json describes, and its model args.

    Raises:
        ValueError: no such directory or config.json, or it fits no flavor; says how it differs from the nearest one.
    """
    if not Path(checkpoint).is_dir():
        raise ValueError(f"no checkpoint directory {checkpoint}: see scripts/download_hf_assets.py")
    misfits = []
    for flavor, args in policy_train_spec(name).model_args.items():
        try:
            check_checkpoint_fits(Path(checkpoint) / "config.json", args)
            return flavor, args
        except ValueError as error:
            misfits.append((str(error).count(";"), flavor, str(error)))
    _, flavor, error = min(misfits)
    raise ValueError(f"{checkpoint} fits no flavor of {name}; the nearest is {flavor}: {error}")


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
