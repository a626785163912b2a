# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import json
from functools import partial
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.rollout.datasets import (
    load_gsm8k,
    load_local,
    load_prompts,
    PromptDataset,
    QA_DATASETS,
    register_datasets,
)
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset
from transformers import AutoTokenizer

CHECKPOINT = Path(__file__).parents[1] / "assets/qwen3_tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def ten_rows(tmp_path):
    rows = [{"question": f"What is {n} more than {n}?", "answer": f"It is\n#### {2 * n}"} for n in range(10)]
    return write_jsonl(tmp_path / "ten.jsonl", rows)


def test_a_prompt_is_the_question_in_the_chat_template(tokenizer, ten_rows):
    dataset = PromptDataset("local", ten_rows, tokenizer, system_prompt="Be brief.")
    prompt = dataset.prompts[3]
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 3 more than 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.prompt_ids == tuple(tokenizer.encode(prompt.text, add_special_tokens=False))
    assert tokenizer.decode(prompt.prompt_ids) == prompt.text
    assert (prompt.row, prompt.answer) == (3, "It is\n#### 6")


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(tokenizer, ten_rows):
    batch = PromptDataset("local", ten_rows, tokenizer, seed=1).next_batch(25)
    orders = [[p.row for p in batch if p.epoch == epoch] for epoch in range(3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]
    assert len(set(orders[2])) == 5
    assert [p.row for p in PromptDataset("local", ten_rows, tokenizer, seed=1).next_batch(25)] == sum(orders, [])
    assert [p.row for p in PromptDataset("local", ten_rows, tokenizer, seed=2).next_batch(10)] != orders[0]


@pytest.mark.parametrize("drawn", [0, 7, 10, 13, 29, 30])
def test_a_restored_position_goes_on_as_if_never_stopped(tokenizer, ten_rows, drawn):
    undisturbed = PromptDataset("local", ten_rows, tokenizer, seed=3)
    undisturbed.next_batch(drawn)
    saved = json.loads(json.dumps(undisturbed.state_dict()))
    resumed = PromptDataset("local", ten_rows, tokenizer, seed=3)
    resumed.load_state_dict(saved)
    for _ in range(5):
        assert resumed.next_batch(6) == undisturbed.next_batch(6)


def test_readers_share_each_epoch_without_overlap(tokenizer, ten_rows):
    shares = [PromptDataset("local", ten_rows, tokenizer, dp_rank=r, dp_world_size=2) for r in range(2)]
    epochs = [[p.row for p in share.next_batch(5)] for share in shares]
    assert sorted(epochs[0] + epochs[1]) == list(range(10))


def test_a_position_in_other_data_is_refused(tokenizer, ten_rows):
    saved = PromptDataset("local", ten_rows, tokenizer, seed=3).state_dict()
    with pytest.raises(ValueError, match="other data"):
        PromptDataset("local", ten_rows, tokenizer, seed=4).load_state_dict(saved)
    with pytest.raises(ValueError, match="other data"):
        PromptDataset("gsm8k_tiny", None, tokenizer, seed=3).load_state_dict(saved)


def test_long_prompts_are_dropped_and_counted_or_refused(tokenizer, tmp_path):
    rows = [{"question": "short", "answer": "1"}, {"question": "long " * 50, "answer": "2"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = PromptDataset("local", path, tokenizer, max_prompt_tokens=40)
    assert dataset.dropped == 1
    assert {p.row for p in dataset.next_batch(4)} == {0}
    with pytest.raises(ValueError, match=r"rows.jsonl: 1 of 2 prompts are longer than 40 tokens, .* row 1 with \d+"):
        PromptDataset("local", path, tokenizer, max_prompt_tokens=40, long_prompts="error")
    with pytest.raises(ValueError, match="2 of 2 prompts are longer than 3 tokens"):
        PromptDataset("local", path, tokenizer, max_prompt_tokens=3)


def test_parquet_and_columns_of_other_names(tokenizer, tmp_path):
    table = pyarrow.table({"problem": ["one?", "two?"], "solution": ["1", "2"]})
    (tmp_path / "main").mkdir()
    for split in ("train", "test"):
        parquet.write_table(table, tmp_path / f"main/{split}-00000-of-00001.parquet")
    columns = {"question_column": "problem", "answer_column": "solution"}
    dataset = PromptDataset("gsm8k", str(tmp_path), tokenizer, split="test", **columns)
    assert [p.answer for p in dataset.prompts] == ["1", "2"]


def test_torchtitans_text_dataset_reads_the_same_rows():
    register_datasets()
    register_datasets()
    text = HuggingFaceTextDataset("gsm8k_tiny", None, HuggingFaceTokenizer(str(CHECKPOINT)), seq_len=64)
    inputs, labels = next(iter(text))
    assert inputs["input"].shape == labels.shape == (64,)
    assert len(DATASETS["gsm8k_tiny"].loader(DATASETS["gsm8k_tiny"].path)) == 6000


def test_the_tiny_test_split_is_unseen(tokenizer):
    train, test = (
        {p.text for p in PromptDataset("gsm8k_tiny", None, tokenizer, split=s).prompts} for s in ("train", "test")
    )
    assert (len(train), len(test)) == (6000, 500)
    assert not train & test


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"question": "a", "answer": "1"}\n{"question": "b"}\n', r"bad.jsonl, row 2 has no 'answer'; columns are"),
        ('{"q": "a", "answer": "1"}\n', r"bad.jsonl, row 1 has no 'question'; columns are \['q', 'answer'\]"),
        ('{"question": "a", "answer": 1}\n', r"bad.jsonl, row 1 has 1, not text, as 'answer'"),
        ('{"question": " ", "answer": "1"}\n', r"bad.jsonl, row 1 has an empty 'question'"),
        ('{"question": "a", "answer": "1"}\n{"question": "b", "answer": 2}\n', r"bad.jsonl: .*type"),
        ('{"question": "a", "answer": "1"}\n{"question"', r"bad.jsonl, line 2 is not JSON"),
        ("[1]\n", r"bad.jsonl, line 1 is not an object"),
        ("", r"bad.jsonl has no rows"),
    ],
)
def test_bad_rows_are_named(tokenizer, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        PromptDataset("local", str(path), tokenizer)


def test_bad_places_are_named(tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    (tmp_path / "rows.parquet").write_text("not parquet")
    for path, message in [
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path, "has none of train.jsonl"),
        (tmp_path / "rows.csv", "neither .jsonl nor .parquet"),
        (tmp_path / "rows.parquet", "is not a Parquet file"),
    ]:
        with pytest.raises(ValueError, match=message):
            PromptDataset("local", str(path), tokenizer)
    with pytest.raises(ValueError, match="Unknown dataset 'gsm9k'; there are gsm8k, gsm8k_tiny, local"):
        PromptDataset("gsm9k", None, tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused(ten_rows):
    plain = AutoTokenizer.from_pretrained(CHECKPOINT)
    plain.chat_template = None
    with pytest.raises(ValueError, match="qwen3_tiny has no chat template"):
        PromptDataset("local", ten_rows, plain)


def test_a_dataset_is_one_entry_selected_by_its_name(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "riddles.jsonl", [{"question": "What is 1 plus 1?", "answer": "#### 2"}])
    monkeypatch.setitem(QA_DATASETS, "riddles", DatasetConfig(path, partial(load_local, split="train"), str))
    config = load_job_config(["--training.dataset", "riddles", "--data.system_prompt", "Be brief."])
    (prompt,) = load_prompts(config).prompts
    assert "Be brief." in prompt.text and "1 plus 1" in prompt.text and prompt.answer == "#### 2"


def test_the_template_gets_its_arguments_from_the_job_config(monkeypatch, tmp_path, ten_rows):
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% if enable_thinking %}<think>{% endif %}{{ messages[-1].content }}"
    settings = json.loads((CHECKPOINT / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    flags = [
        "--model.hf_assets_path",
        str(tmp_path),
        "--training.dataset",
        "local",
        "--training.dataset_path",
        ten_rows,
    ]
    flags += ["--data.template_kwargs", "enable_thinking"]
    texts = [load_prompts(load_job_config([*flags, value])).prompts[1].text for value in ("True", "False")]
    assert texts == ["<think>What is 1 more than 1?", "What is 1 more than 1?"]


def test_gsm8k_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"Can't load openai/gsm8k .* dataset_path"):
        load_gsm8k("openai/gsm8k", "train")
