# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Random Qwen3 checkpoints of any shape, for the parity check and the benchmarks. Imported by scripts beside it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchtitan.experiments.rl.unified.config.load import REPOSITORY
from torchtitan.experiments.rl.unified.families.base import hf_config, policy_train_spec
from torchtitan.protocols import train_spec

TOKENIZER = REPOSITORY / "tests/assets/qwen3_tiny"
# Name of the TrainSpec that holds the last shape written.
RANDOM = "random_qwen3"


def register_random(flavor: str, changes: dict) -> tuple[Any, Any]:
    """Puts the shape into TrainSpec `RANDOM` of this process; returns Qwen3's TrainSpec and the shape's model args.

    Args:
        flavor: name of the shape in the TrainSpec.
        changes: model args that differ from those of flavor "tiny".
    """
    spec = policy_train_spec("qwen3")
    args = replace(spec.model_args["tiny"], **changes)
    for registered in (RANDOM, f"{RANDOM}_policy"):  # The trainer's own entry is made from the first.
        train_spec._extra_train_specs.pop(registered, None)
    train_spec.register_train_spec(RANDOM, replace(spec, model_args={flavor: args}))
    return spec, args


def write_random_checkpoint(folder: Path, flavor: str, changes: dict) -> None:
    """A random Qwen3 in Hugging Face layout, its flavor registered as by `register_random`; makes the folder."""
    spec, args = register_random(flavor, changes)
    torch.manual_seed(0)
    with torch.no_grad():
        model = spec.model_cls(args)
        for param in model.parameters():
            # TorchTitan's own initialisation, tied, repeats the last token with certainty: its log-probs are all 0.
            # With these widths the next token has an entropy of some 4.5 nats in a vocabulary of 512.
            param.normal_(0, 0.16 * (128 / args.dim) ** 0.5) if param.ndim == 2 else param.uniform_(0.5, 1.5)
    adapter = spec.state_dict_adapter(args, None)
    folder.mkdir()
    weights = {name: weight.contiguous() for name, weight in adapter.to_hf(model.state_dict()).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    extra = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float32"}
    limits = {"max_position_embeddings": args.max_seq_len, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(hf_config(args) | extra | limits))
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
