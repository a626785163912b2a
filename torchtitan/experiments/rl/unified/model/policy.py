# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A TrainSpec as this experiment runs it: packed sequences, so the same model serves training and paged generation."""

import copy
import dataclasses

from torchtitan.experiments.rl.unified.model.spec import register_train_specs
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
