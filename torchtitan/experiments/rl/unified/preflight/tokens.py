# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the checkpoint's tokenizer and template mean what its own files say."""

import json
from pathlib import Path

from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.preflight.model import model_of_job
from torchtitan.experiments.rl.unified.rollout.chat import check_stop, check_tokenizer, check_turn_end
from torchtitan.experiments.rl.unified.rollout.datasets import check_ids
from torchtitan.experiments.rl.unified.rollout.task import Task

# Texts that both readings of a tokenizer must agree on.
_TEXTS = 20


def check_tokens(config: JobConfig, task: Task) -> None:
    """The job's prompts are tokens of the model, read as tokenizer.json says; stop strings can come up, and what ends a
    turn ends a completion.

    Raises:
        ValueError: says which does not hold, and for which row.
    """
    from transformers import AutoTokenizer

    path, prompts = config.model.hf_assets_path, task.prompts.prompts
    check_ids(prompts, model_of_job(config).geometry.vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(path)
    check_tokenizer(tokenizer, path, [prompt.text for prompt in prompts[:_TEXTS]])
    check_stop(tokenizer, config.sampling.stop, config.sampling.special_tokens_in_text)
    check_turn_end(tokenizer, end_ids(path), config.sampling.stop)


def end_ids(path: str) -> list[int]:
    """The tokens that end a completion, as vLLM reads them: generation_config.json's eos_token_id, or config.json's."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []
