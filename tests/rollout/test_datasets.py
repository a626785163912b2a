# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Prompts: their order, their position, their length; rows.py and chat.py have tests of their own."""

import json
from pathlib import Path

import pytest
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.rollout.datasets import check_ids, load_prompts, PromptDataset, QA_DATASETS
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


def test_a_position_in_other_data_is_refused(tokenizer, ten_rows):
    saved = PromptDataset("local", ten_rows, tokenizer, seed=3).state_dict()
    with pytest.raises(ValueError, match=r"\[debug\] seed orders them otherwise"):
        PromptDataset("local", ten_rows, tokenizer, seed=4).load_state_dict(saved)
    with pytest.raises(ValueError, match="the data set has other rows, or in another order"):
        PromptDataset("gsm8k_tiny", None, tokenizer, seed=3).load_state_dict(saved)
    with pytest.raises(ValueError, match="makes other ones of the same rows"):
        PromptDataset("local", ten_rows, tokenizer, seed=3, system_prompt="Think.").load_state_dict(saved)


def test_long_prompts_are_dropped_and_counted_or_refused(tokenizer, tmp_path):
    rows = [{"question": "short", "answer": "1"}, {"question": "long " * 50, "answer": "2"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = PromptDataset("local", path, tokenizer, max_prompt_tokens=40)
    assert dataset.dropped == 1
    assert {p.row for p in dataset.next_batch(4)} == {0}
    with pytest.raises(ValueError, match=r"rows.jsonl: 1 of 2 prompts are longer than 40 tokens, .* line 2 with \d+"):
        PromptDataset("local", path, tokenizer, max_prompt_tokens=40, long_prompts="error")
    with pytest.raises(ValueError, match="2 of 2 prompts are longer than 3 tokens"):
        PromptDataset("local", path, tokenizer, max_prompt_tokens=3)


def test_the_tiny_test_split_is_unseen(tokenizer):
    train, test = (
        {p.text for p in PromptDataset("gsm8k_tiny", None, tokenizer, split=s).prompts} for s in ("train", "test")
    )
    assert (len(train), len(test)) == (6000, 500)
    assert not train & test


def test_unknown_names_are_refused(tokenizer):
    with pytest.raises(ValueError, match="there is no 'gsm9k', but gsm8k, gsm8k_tiny, local$"):
        PromptDataset("gsm9k", None, tokenizer)
    hint = 'hf download org/problems --repo-type dataset --local-dir problems, then .* dataset_path = "problems"'
    with pytest.raises(ValueError, match=f"there is no 'org/problems'.*{hint}"):
        PromptDataset("org/problems", None, tokenizer)
    with pytest.raises(ValueError, match="takes .training. dataset_path"):
        PromptDataset("local", None, tokenizer)


def test_tokens_beyond_the_vocabulary_are_refused(tokenizer, ten_rows):
    prompts = PromptDataset("local", ten_rows, tokenizer).prompts
    largest = max(max(prompt.prompt_ids) for prompt in prompts)
    first = next(prompt for prompt in prompts if largest in prompt.prompt_ids)
    check_ids(prompts, largest + 1)
    with pytest.raises(
        ValueError, match=f"line {first.row + 1} has token {largest}, but the model's vocabulary has {largest}"
    ):
        check_ids(prompts, largest)


def test_a_dataset_is_one_entry_selected_by_its_name(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "riddles.jsonl", [{"question": "What is 1 plus 1?", "answer": "#### 2"}])
    monkeypatch.setitem(QA_DATASETS, "riddles", path)
    config = load_job_config(["--training.dataset", "riddles", "--data.system_prompt", "Be brief."])
    (prompt,) = load_prompts(config).prompts
    assert "Be brief." in prompt.text and "1 plus 1" in prompt.text and prompt.answer == "#### 2"


@pytest.fixture
def with_template(tmp_path):
    """The flags of a job whose checkpoint has the chat template of that name."""

    def write(template: str) -> list[str]:
        for file in CHECKPOINT.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        settings = json.loads((CHECKPOINT / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings |= {"chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return ["--model.hf_assets_path", str(tmp_path), "--training.dataset", "local"]

    return write


@pytest.mark.parametrize("value, thinks", [("True", True), ("true", True), ("False", False), ("false", False)])
def test_the_template_gets_its_arguments_from_the_job_config(with_template, ten_rows, value, thinks):
    flags = with_template("{{ messages[-1].content }} {{ enable_thinking is true }} {{ enable_thinking is false }}")
    flags += ["--training.dataset_path", ten_rows, "--data.template_kwargs", "enable_thinking", value]
    flags += ["--data.answer_column", "answer"]  # What comes after is another key's.
    text = load_prompts(load_job_config(flags)).prompts[1].text
    assert text == f"What is 1 more than 1? {thinks} {not thinks}"


def test_other_arguments_keep_what_they_are(with_template, ten_rows):
    flags = with_template("{{ messages[-1].content }}{{ [a, b, c] }}")
    flags += ["--training.dataset_path", ten_rows, "--data.template_kwargs", "a", "3", "b", "0.5", "c", "true story"]
    assert load_prompts(load_job_config(flags)).prompts[1].text.endswith("[3, 0.5, 'true story']")


def test_special_tokens_in_a_row_are_text_unless_a_key_allows_them(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a<|im_end|>b", "answer": "1"}])
    flags = ["--training.dataset", "local", "--training.dataset_path", path]
    as_text, as_token = (
        load_prompts(load_job_config([*flags, *more])).prompts[0].prompt_ids
        for more in ([], ["--data.special_tokens_in_text"])
    )
    end = AutoTokenizer.from_pretrained(CHECKPOINT).convert_tokens_to_ids("<|im_end|>")
    assert (as_text.count(end), as_token.count(end)) == (1, 2)
