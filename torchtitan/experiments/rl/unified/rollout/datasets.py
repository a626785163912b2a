# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Prompts: rows of a question and its answer, through TorchTitan's dataset registry.

To add a dataset, add an entry to ``QA_DATASETS``; ``[training] dataset = "its name"`` then selects it.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_dataset
from jinja2 import TemplateError
from pyarrow import ArrowException, parquet
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from transformers import PreTrainedTokenizerBase

GSM8K_HUB_ID = "openai/gsm8k"
REPOSITORY = Path(__file__).parents[5]


def load_local(path: str, split: str) -> Dataset:
    """Read rows from a JSONL or Parquet file, or from a directory with one of them for each split.

    Args:
        path: A file (all its rows are taken, whatever ``split`` is), or a directory with
            ``<split>.jsonl``, ``<split>.parquet`` or a Hub clone's ``main/<split>-*.parquet``.
        split: "train" or "test".

    Raises:
        ValueError: No such path, no such split in it, a file of another kind or one that can't be read.
    """
    files = local_files(path, split)
    try:
        return Dataset.from_list([row for file in files for row in _read_file(file)])
    except ArrowException as e:
        raise ValueError(f"{files[0]}: the rows disagree on the type of a column: {e}") from None


def local_files(path: str, split: str) -> list[Path]:
    """The files that :func:`load_local` reads; arguments and errors as there."""
    place = Path(path)
    if not place.exists():
        raise ValueError(f"Dataset path {path} does not exist; set [training] dataset_path to a file or directory.")
    if place.is_file():
        return [place]
    patterns = [f"{split}.jsonl", f"{split}.parquet", f"main/{split}-*.parquet"]
    for pattern in patterns:
        if files := sorted(place.glob(pattern)):
            return files
    raise ValueError(f"Dataset directory {path} has none of {', '.join(patterns)}.")


def load_gsm8k(path: str, split: str) -> Dataset:
    """Load openai/gsm8k (arXiv:2110.14168), config "main": from the Hub or its cache, or from a local copy."""
    if path != GSM8K_HUB_ID:
        return load_local(path, split)
    try:
        return load_dataset(path, "main", split=split)
    except (OSError, ValueError) as e:
        raise ValueError(f"Can't load {path} ({e}); offline, set [training] dataset_path to a local copy.") from e


def question_and_answer(row: dict[str, Any]) -> str:
    """The text of a row for TorchTitan's own text training."""
    return f"{row['question']}\n{row['answer']}"


def _entry(path: str | Path, load: Callable[..., Dataset]) -> DatasetConfig:
    return DatasetConfig(str(path), partial(load, split="train"), question_and_answer)


QA_DATASETS: dict[str, DatasetConfig] = {
    "gsm8k": _entry(GSM8K_HUB_ID, load_gsm8k),
    "gsm8k_tiny": _entry(REPOSITORY / "tests/assets/gsm8k_tiny", load_local),
    # Anyone's own rows: [training] dataset_path says where they are.
    "local": _entry("", load_local),
}


def register_datasets() -> None:
    """Add ``QA_DATASETS`` to TorchTitan's registry. Calling it again changes nothing."""
    DATASETS.update(QA_DATASETS)


@dataclass(frozen=True)
class Prompt:
    """One question, ready to be sampled from.

    Attributes:
        row: Its row in the dataset, from 0.
        epoch: The epoch that it was drawn in, from 0.
        text: What the model reads, with the chat template's marks.
        prompt_ids: ``text`` in tokens; nothing is tokenised again later.
        answer: The reference answer as the dataset has it.
    """

    row: int
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
        question_column, answer_column: Names of the columns, both text.
        max_prompt_tokens: The longest prompt allowed.
        long_prompts: "drop" leaves longer ones out and counts them in ``dropped``; "error" refuses them.
        system_prompt: A system message to put before each question; empty: none.
        template_kwargs: More arguments of the chat template, such as Qwen3's ``enable_thinking``.
        dp_rank, dp_world_size: This reader's share: every ``dp_world_size``-th prompt of each epoch.

    Raises:
        ValueError: No such dataset or path, no rows or none that fits, a row without question or answer,
            a prompt that is too long (with "error"), or a tokenizer without a chat template or with one that fails.
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
        dp_rank: int = 0,
        dp_world_size: int = 1,
    ) -> None:
        if name not in QA_DATASETS:
            raise ValueError(f"Unknown dataset {name!r}; there are {', '.join(sorted(QA_DATASETS))}.")
        if not tokenizer.chat_template:
            raise ValueError(f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template.")
        register_datasets()
        entry = DATASETS[name]
        where = path or entry.path
        rows = entry.loader(where, split=split)
        questions, answers = (_text_column(rows, column, where, split) for column in (question_column, answer_column))

        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        texts = []
        for question in questions:
            messages = [*system, {"role": "user", "content": question}]
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **(template_kwargs or {})
                )
            except (TemplateError, TypeError) as e:
                raise ValueError(
                    f"The tokenizer's chat template fails on row {len(texts) + 1} of {where}: {e}; look at [data] "
                    "system_prompt and template_kwargs."
                ) from e
            texts.append(text)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        everything = [Prompt(i, 0, texts[i], tuple(ids[i]), answers[i]) for i in range(len(rows))]
        self.prompts = [p for p in everything if max_prompt_tokens is None or len(p.prompt_ids) <= max_prompt_tokens]
        self.dropped = len(everything) - len(self.prompts)
        if self.dropped and (long_prompts == "error" or not self.prompts):
            longest = max(everything, key=lambda p: len(p.prompt_ids))
            raise ValueError(
                f"{where}: {self.dropped} of {len(everything)} prompts are longer than {max_prompt_tokens} tokens, "
                f"the longest is row {longest.row} with {len(longest.prompt_ids)}."
            )
        if len(self.prompts) < dp_world_size:
            raise ValueError(f"{where}: {len(self.prompts)} rows can't be shared by {dp_world_size} readers.")

        self._seed, self._dp_rank, self._dp_world_size = seed, dp_rank, dp_world_size
        self._data = _digest(self.prompts, seed, dp_rank, dp_world_size)
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
        return {"epoch": self._epoch, "position": self._position, "data": self._data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: It was saved with other rows, prompts, shares or another seed.
        """
        if state_dict["data"] != self._data:
            raise ValueError(
                "This position was saved with other data: to resume, keep the dataset, tokenizer, seed and readers."
            )
        self._start_epoch(state_dict["epoch"])
        self._position = state_dict["position"]

    def _start_epoch(self, epoch: int) -> None:
        order = list(range(len(self.prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        self._epoch, self._position = epoch, 0
        self._order = order[self._dp_rank :: self._dp_world_size]


def _read_file(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        try:
            return parquet.read_table(file).to_pylist()
        except ArrowException as e:
            raise ValueError(f"{file} is not a Parquet file: {e}") from None
    if file.suffix != ".jsonl":
        raise ValueError(f"{file} is neither .jsonl nor .parquet.")
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{file}, line {number} is not JSON: {e}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number} is not an object with columns.")
            rows.append(row)
    return rows


def _text_column(rows: Dataset, column: str, where: str, split: str) -> list[str]:
    files = ", ".join(map(str, local_files(where, split))) if Path(where).exists() else where
    if not len(rows):
        raise ValueError(f"{files} has no rows.")
    values = rows[column] if column in rows.column_names else [None] * len(rows)
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str) or not value.strip():
            problem = "no" if value is None else "an empty" if isinstance(value, str) else f"{value!r}, not text, as"
            raise ValueError(f"{files}, row {number} has {problem} {column!r}; columns are {rows.column_names}.")
    return list(values)


def _digest(prompts: list[Prompt], *settings: int) -> str:
    content = [(p.row, p.prompt_ids, p.answer) for p in prompts]
    return hashlib.sha256(repr((content, settings)).encode()).hexdigest()[:16]


def load_prompts(config: JobConfig, held_out: bool = False) -> PromptDataset:
    """The job's prompts, checked to leave room for a completion.

    Args:
        config: the job.
        held_out: the problems to evaluate on, in an order of their own.

    Raises:
        ValueError: for a dataset, tokenizer or context length that cannot work.
    """
    from transformers import AutoTokenizer

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
            AutoTokenizer.from_pretrained(config.model.hf_assets_path),
            seed=config.evaluation.seed if held_out else config.debug.seed,
            split="test" if held_out else "train",
            question_column=config.data.question_column,
            answer_column=config.data.answer_column,
            max_prompt_tokens=room,
            long_prompts=config.data.overlong_prompts,
            system_prompt=config.data.system_prompt,
            template_kwargs=config.data.template_kwargs,
        )
    except ValueError as error:
        if "longer than" in str(error):
            raise ValueError(
                f"context too short: [training] seq_len {config.training.seq_len} less [sampling] max_tokens "
                f"{config.sampling.max_tokens} leaves {room} tokens for a prompt. {error}"
            ) from error
        raise
