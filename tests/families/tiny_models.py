# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Tiny random checkpoints that transformers writes, its logits, and ours. Imported by tests beside it."""

import json
from pathlib import Path
from typing import Any

import torch
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.families.tensors import find_weights, load_matched
from torchtitan.experiments.rl.unified.trainer.attention import StockAttention
from torchtitan.models.attention import VarlenMetadata
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Large enough that attention is far from uniform, and a wrong constant shows.
    "initializer_range": 0.15,
}
IDS = torch.randint(96, (1, 60), generator=torch.Generator().manual_seed(0))


def write(folder: Path, model_type: str = "qwen3", **fields: Any) -> Path:
    """A random model of transformers' own, saved by it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **fields})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:  # Norms begin as 1, which hides a missing one.
                param.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, **fields: Any) -> None:
    """Sets fields of config.json; None stays as null."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def our_logits(folder: Path, weights: Path | None = None) -> torch.Tensor:
    """(tokens, vocabulary) of TorchTitan's model as the trainer runs it, in fp32.

    Args:
        folder: has config.json.
        weights: the checkpoint; None: `folder`.
    """
    policy = model_of_checkpoint(str(folder))
    checkpoint, names = find_weights(policy, weights or folder)
    with torch.no_grad():
        model = policy.build()
        model.init_weights()
    state = dict(load_matched(checkpoint, names))
    adapter = policy.train_spec().state_dict_adapter(policy.args, None)
    model.load_state_dict(adapter.from_hf(state) if checkpoint.kind == "hf" else state)
    policy.family.replace_attention(model, lambda name: StockAttention())
    ids = IDS % policy.args.vocab_size
    bounds = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    masks = VarlenMetadata(bounds, bounds, ids.shape[1], ids.shape[1])
    with torch.no_grad():
        return model(ids, attention_masks=masks, positions=torch.arange(ids.shape[1])[None])[0]


def transformers_logits(folder: Path) -> torch.Tensor:
    """The same of transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", return_dict=True
    )
    with torch.no_grad():
        return model(IDS % model.config.vocab_size).logits[0]


def assert_same(folder: Path) -> None:
    """Ours are transformers', as near as transformers' own two ways to attend are to each other."""
    ours, reference = our_logits(folder), transformers_logits(folder)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))
