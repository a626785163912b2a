# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Random checkpoints as transformers writes them, of shapes that no flavor of torchtitan's has."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

TOKENIZER = Path(__file__).parents[1] / "assets/qwen3_tiny"
_COMMON = {"vocab_size": 512, "max_position_embeddings": 4096, "eos_token_id": [3, 4], "bos_token_id": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(
        hidden_size=192, num_attention_heads=6, num_key_value_heads=3, head_dim=32, num_hidden_layers=3,
        intermediate_size=352, tie_word_embeddings=False, **_COMMON,
    ),
    "llama": LlamaConfig(
        # SmolLM2's heads: threads divide its rotation where a vector is not at its end.
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2, intermediate_size=520,
        tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
        },
        **_COMMON,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=2,
        moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        tie_word_embeddings=False, **_COMMON,
    ),
}  # fmt: skip


def write_checkpoint(folder: Path, kind: str, **save) -> Path:
    """Writes the checkpoint `kind` of CONFIGS into `folder`, with the tiny checkpoint's tokenizer; returns `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            # Wide enough that the next token is far from certain and from uniform.
            param.normal_(0, 1.6 * param.shape[-1] ** -0.5) if param.ndim > 1 else param.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **save)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder
