# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A TrainSpec as this experiment runs it: packed sequences, so the same model serves training and paged generation."""

import copy
import dataclasses
from pathlib import Path

from torchtitan.experiments.rl.unified.model.spec import check_checkpoint_fits, register_train_specs
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
