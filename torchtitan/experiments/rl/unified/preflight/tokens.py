# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the checkpoint's tokenizer and template mean what its own files say, and what ends a completion."""

from collections.abc import Sequence

from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.preflight.model import model_of_job
from torchtitan.experiments.rl.unified.rollout.chat import check_stop, check_turn_end
from torchtitan.experiments.rl.unified.rollout.datasets import check_ids, Prompt
from torchtitan.experiments.rl.unified.rollout.task import Task
from torchtitan.experiments.rl.unified.tokenizer import check_tokenizer, end_ids, load_tokenizer

_SHOWN = 12


def check_tokens(config: JobConfig, task: Task, held_out: Sequence[Prompt]) -> str:
    """The job's prompts are tokens of the model, read as tokenizer.json says; stop strings can come up, and what ends a
    turn ends a completion.

    Returns:
        What ends a completion, in words.

    Raises:
        ValueError: says which does not hold, and for which row.
    """
    path, prompts, sampling = config.model.hf_assets_path, [*task.prompts.prompts, *held_out], config.sampling
    vocabulary = model_of_job(config).geometry.vocabulary
    check_ids(prompts, vocabulary)
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, path, [prompt.text for prompt in prompts])
    check_stop(tokenizer, sampling.stop, sampling.special_tokens_in_text)
    ends = end_ids(tokenizer, path, vocabulary)
    check_turn_end(tokenizer, ends, sampling.stop)
    texts = [*(tokenizer.decode([token]) for token in ends), *sampling.stop]
    shown = [repr(text) for text in dict.fromkeys(texts)]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"at {', '.join(shown[:_SHOWN]) or 'no token'}{more}, or after {sampling.max_tokens} tokens"
