# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Random Qwen3 checkpoints of any shape, for the parity check and the benchmarks. Imported by scripts beside it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchtitan.experiments.rl.unified.config.load import REPOSITORY
from torchtitan.experiments.rl.unified.families import family

TOKENIZER = REPOSITORY / "tests/assets/qwen3_tiny"


def write_random_checkpoint(folder: Path, changes: dict) -> None:
    """A random Qwen3 in Hugging Face layout.

    Args:
        folder: to make.
        changes: model args that differ from those of flavor "tiny".
    """
    qwen3 = family("qwen3")
    spec = qwen3.train_spec()
    args = replace(spec.model_args["tiny"], **changes)
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
    extra = {"architectures": ["Qwen3ForCausalLM"], "torch_dtype": "float32"}
    limits = {"max_position_embeddings": args.max_seq_len, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(qwen3.to_hf(args) | extra | limits))
    for file in (*TOKENIZER.glob("tokenizer*"), TOKENIZER / "generation_config.json"):
        shutil.copy(file, folder / file.name)


def letters(sample) -> float:
    """A reward that a random policy gets more or less of, so that its weights move: the letters of its completion."""
    return float(len(sample.completion))
