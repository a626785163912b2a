# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Prompts: questions in the chat template, in an order without end that can be gone on from.

To add a dataset, add an entry to ``QA_DATASETS``; ``[training] dataset = "its name"`` then selects it.
"""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.rollout.chat import ChatTemplate
from torchtitan.experiments.rl.unified.rollout.rows import download_hint, GSM8K_HUB_ID, read_rows
from torchtitan.experiments.rl.unified.tokenizer import load_tokenizer
from transformers import PreTrainedTokenizerBase

REPOSITORY = Path(__file__).parents[5]

# Name -> where its rows are; `read_rows` says what may stand there.
QA_DATASETS = {
    "gsm8k": GSM8K_HUB_ID,
    "gsm8k_tiny": str(REPOSITORY / "tests/assets/gsm8k_tiny"),
    # Anyone's own rows: [training] dataset_path says where they are.
    "local": "",
}


@dataclass(frozen=True)
class Prompt:
    """One question, ready to be sampled from.

    Attributes:
        row: Its row in the dataset, from 0.
        place: Where that is, for people: file and line.
        epoch: The epoch that it was drawn in, from 0.
        text: What the model reads, with the chat template's marks.
        prompt_ids: ``text`` in tokens; nothing is tokenised again later.
        answer: The reference answer as the dataset has it.
    """

    row: int
    place: str
    epoch: int
    text: str
    prompt_ids: tuple[int, ...]
    answer: str


class PromptDataset:
    """Prompts without end, each epoch in another order, from a position that can be saved.

    The order depends on ``seed`` and the epoch alone. All rows are read, checked and tokenised here,
    so that a bad one is found before a run starts.

    Args:
        name: A name in ``QA_DATASETS``.
        path: Where the rows are, in place of the entry's own path.
        tokenizer: Its chat template makes the prompts.
        seed: Of the order.
        split: "train" or "test".
        question_column, answer_column: Where the two are, see `read_rows`.
        max_prompt_tokens: The longest prompt allowed.
        long_prompts: "drop" leaves longer ones out and counts them in ``dropped``; "error" refuses them.
        system_prompt: A system message to put before each question; empty: none.
        template_kwargs: More arguments of the chat template, such as Qwen3's ``enable_thinking``.
        special_tokens_in_text: A special token's name in a row is that token, not text.
        date: The day that the template gets when it asks for today's; empty: one that asks is refused.

    Raises:
        ValueError: No such dataset or path, no rows or none that fits, a row that cannot be used, a prompt that is too
            long (with "error"), or a chat template that fails or leaves out what it was given.
    """

    def __init__(
        self,
        name: str,
        path: str | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        split: str = "train",
        question_column: str = "question",
        answer_column: str = "answer",
        max_prompt_tokens: int | None = None,
        long_prompts: Literal["drop", "error"] = "drop",
        system_prompt: str = "",
        template_kwargs: dict[str, Any] | None = None,
        special_tokens_in_text: bool = False,
        date: str = "",
    ) -> None:
        if name not in QA_DATASETS:
            known = ", ".join(sorted(QA_DATASETS))
            raise ValueError(f"[training] dataset: there is no {name!r}, but {known}{download_hint(name)}")
        where = path or QA_DATASETS[name]
        if not where:
            raise ValueError(f'[training] dataset = "{name}" takes [training] dataset_path, a file or directory')
        template = ChatTemplate(tokenizer, template_kwargs or {}, system_prompt, special_tokens_in_text, date)
        rows = read_rows(where, split, question_column, answer_column)
        everything = [
            Prompt(i, row.place, 0, text, tuple(ids), row.answer)
            for i, (row, (text, ids)) in enumerate(zip(rows, template.encode(rows), strict=True))
        ]
        self.prompts = [p for p in everything if max_prompt_tokens is None or len(p.prompt_ids) <= max_prompt_tokens]
        self.dropped = len(everything) - len(self.prompts)
        if self.dropped and (long_prompts == "error" or not self.prompts):
            longest = max(everything, key=lambda p: len(p.prompt_ids))
            raise ValueError(
                f"{where}: {self.dropped} of {len(everything)} prompts are longer than {max_prompt_tokens} tokens, "
                f"the longest is that of {longest.place} with {len(longest.prompt_ids)}."
            )
        self._seed = seed
        # What a position is one in: each with its words for when it is not what it was.
        self._data = {
            "seed": str(seed),
            "rows": _digest([(row.messages, row.answer) for row in rows]),
            "prompts": _digest([(p.row, p.prompt_ids, p.answer) for p in self.prompts]),
        }
        self._start_epoch(0)

    def next_batch(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts; goes on into the next epoch where this one ends."""
        batch = []
        while len(batch) < n:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            batch.append(replace(self.prompts[self._order[self._position]], epoch=self._epoch))
            self._position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"epoch": self._epoch, "position": self._position, **self._data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: It was saved with other rows, prompts or another seed.
        """
        for name, cause in _CAUSES.items():
            if state_dict.get(name) != self._data[name]:
                raise ValueError(
                    f"the position that was saved is one among other prompts: {cause}. Put that back, or begin another "
                    "run ([job] dump_folder) with this one's weights: [checkpoint] initial_load_path"
                )
        self._start_epoch(state_dict["epoch"])
        self._position = state_dict["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._order = list(range(len(self.prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        self._epoch, self._position = epoch, 0


def check_ids(prompts: Iterable[Prompt], vocab_size: int) -> None:
    """Every token of `prompts` is in a model's vocabulary.

    Raises:
        ValueError: names the first row that has another, which the tokenizer of another model would give.
    """
    for prompt in prompts:
        if (largest := max(prompt.prompt_ids)) >= vocab_size:
            raise ValueError(
                f"{prompt.place} has token {largest}, but the model's vocabulary has {vocab_size}: the tokenizer in "
                "[model] hf_assets_path is another model's, or has tokens that the model was not given"
            )


_CAUSES = {
    "rows": "the data set has other rows, or in another order",
    "prompts": "the tokenizer, its chat template, [data] or the room for a prompt makes other ones of the same rows",
    "seed": "[debug] seed orders them otherwise",
}


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_prompts(config: JobConfig, held_out: bool = False) -> PromptDataset:
    """The job's prompts, checked to leave room for a completion.

    Args:
        config: the job.
        held_out: the problems to evaluate on, in an order of their own.

    Raises:
        ValueError: for a dataset, tokenizer or context length that cannot work.
    """
    room = config.training.seq_len - config.sampling.max_tokens
    if room < 1:
        raise ValueError(
            f"context too short: [training] seq_len {config.training.seq_len} leaves no room for a prompt before "
            f"[sampling] max_tokens {config.sampling.max_tokens}; raise the one or lower the other"
        )
    try:
        return PromptDataset(
            config.training.dataset,
            (
                config.evaluation.dataset_path or config.training.dataset_path
                if held_out
                else config.training.dataset_path
            ),
            load_tokenizer(config.model.hf_assets_path),
            seed=config.evaluation.seed if held_out else config.debug.seed,
            split="test" if held_out else "train",
            question_column=config.data.question_column,
            answer_column=config.data.answer_column,
            max_prompt_tokens=room,
            long_prompts=config.data.overlong_prompts,
            system_prompt=config.data.system_prompt,
            template_kwargs=config.data.template_kwargs,
            special_tokens_in_text=config.data.special_tokens_in_text,
            date=config.data.date,
        )
    except ValueError as error:
        if "longer than" in str(error):
            raise ValueError(
                f"context too short: [training] seq_len {config.training.seq_len} less [sampling] max_tokens "
                f"{config.sampling.max_tokens} leaves {room} tokens for a prompt. {error}"
            ) from error
        raise
