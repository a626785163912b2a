# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rows out of the files that people have: read, or refused by file and line."""

import csv
import gzip
import json
import shutil
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.rollout.rows import GSM8K_HUB_ID, read_rows

ROWS = [{"question": "one?", "answer": "1"}, {"question": "zwei: \u00e4?", "answer": "#### 2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path, split: str = "train", question: str = "question", answer: str = "answer") -> list[tuple[str, str]]:
    rows = read_rows(str(path), split, question, answer)
    assert all(len(row.messages) == 1 and row.messages[0]["role"] == "user" for row in rows)
    return [(row.messages[0]["content"], row.answer) for row in rows]


EXPECTED = [tuple(row.values()) for row in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode("utf-8"),
        b"\xef\xbb\xbf" + LINES.encode("utf-8"),
        LINES.encode("utf-8") + b"\n",
        b"\n" + LINES.encode("utf-8").replace(b"\n", b"\r\n") + b"  \r\n",
        LINES.strip().encode("utf-8"),
        "".join(json.dumps(row) + "\n" for row in ROWS).encode("ascii"),
    ],
)
def test_lines_of_json_in_their_spellings(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert read(tmp_path / "rows.jsonl") == EXPECTED


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["id", "question", "answer"])
        writer.writeheader()
        writer.writerows({"id": number, **row} for number, row in enumerate(ROWS))


WRITERS = {
    "train.jsonl": lambda path: path.write_text(LINES, encoding="utf-8"),
    "train.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode("utf-8"))),
    "train.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "train.csv": write_csv,
    "train-00000-of-00001.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("folder", ["", "data", "main"])
def test_formats_as_a_file_a_folder_and_a_pattern(tmp_path, monkeypatch, name, folder):
    file = tmp_path / folder / name
    file.parent.mkdir(exist_ok=True)
    WRITERS[name](file)
    assert read(file) == read(tmp_path) == read(file.parent / "train*") == EXPECTED
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~") == EXPECTED
    with pytest.raises(ValueError, match="has no test.* or test-"):
        read(tmp_path, "test")


def test_what_datasets_saved_to_disk(tmp_path):
    rows = Dataset.from_list([{**row, "id": 1} for row in ROWS])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "one") == read(tmp_path / "splits", "test") == EXPECTED
    with pytest.raises(ValueError, match="splits has no split 'train', but test"):
        read(tmp_path / "splits")
    for name, end in (
        ("state.json", "is no whole data set that was saved"),
        ("*.arrow", "whole data set|row 1 cannot"),
    ):
        shutil.copytree(tmp_path / "one", tmp_path / "cut")
        (file,) = (tmp_path / "cut").glob(name)
        file.write_bytes(file.read_bytes()[:150])
        with pytest.raises(ValueError, match=rf"^{tmp_path}/cut.*({end})"):
            read(tmp_path / "cut")
        shutil.rmtree(tmp_path / "cut")


def test_a_column_that_a_parquet_file_has_twice(tmp_path):
    table = pyarrow.Table.from_arrays([["a"], ["1"], ["2"]], names=["question", "answer", "answer"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet names the column 'answer' twice"):
        read(tmp_path / "rows.parquet")


def test_of_two_sets_of_files_none_is_passed_over(tmp_path):
    for name in ("train.jsonl", "train-0.jsonl"):
        (tmp_path / name).write_text(LINES, encoding="utf-8")
    with pytest.raises(ValueError, match="has train.jsonl and train-\\*.jsonl: name the one to read"):
        read(tmp_path)


def test_a_role_is_a_name(tmp_path):
    row = {"question": [{"role": "user\n<|im_end|>", "content": "a"}], "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 has a message of the role 'user.*', which is no name"):
        read(tmp_path / "rows.jsonl")


def test_what_a_template_is_not_given_is_named(tmp_path):
    message = {"role": "user", "content": "a", "name": None, "tool_calls": [1]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": [message], "answer": "1"}), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 has a message with 'tool_calls' in 'question': templates here get"):
        read(tmp_path / "rows.jsonl")


def test_a_tilde_in_the_job_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(LINES, encoding="utf-8")
    assert (
        load_job_config(["--training.dataset_path", "~/rows.jsonl"]).training.dataset_path == f"{tmp_path}/rows.jsonl"
    )


def test_columns_that_nobody_uses_decide_nothing(tmp_path):
    others = [{"hash": 2**70, "id": 1}, {"hash": None, "id": "two", "more": [1, "a", {}]}]
    lines = [json.dumps({**row, **other}) for row, other in zip(ROWS, others, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read(tmp_path / "rows.jsonl") == EXPECTED


@pytest.mark.parametrize("answer, text", [(42, "42"), (-3, "-3"), (0.5, "0.5"), (2**70, str(2**70))])
def test_answers_may_be_numbers(tmp_path, answer, text):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": answer}), encoding="utf-8")
    assert read(tmp_path / "rows.jsonl") == [("a", text)]


def test_a_decimal_number_of_parquet(tmp_path):
    table = pyarrow.table({"question": ["a"], "answer": [Decimal("2.50")], "hash": [b"x"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [("a", "2.50")]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_messages_and_nested_fields(tmp_path, ending):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one?"}]
    row = {"prompt": messages, "reward_model": {"style": "rule", "ground_truth": "1"}, "a.b": "2"}
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row), encoding="utf-8")
    (found,) = read_rows(str(path), "train", "prompt", "reward_model.ground_truth")
    assert found.messages == tuple(messages) and found.answer == "1"
    assert read_rows(str(path), "train", "prompt", "a.b")[0].answer == "2"
    if ending == "jsonl":
        (found,) = read_rows(str(path), "train", "prompt", "a.b")
        assert found.answer == "2"


GOOD = json.dumps(ROWS[0]).encode("ascii") + b"\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD + b"\n" + b'{"question": "b"}', r"bad.jsonl, line 3 has no 'answer' .*'answer' is not in \['question'\]"),
        (b'{"q": "a", "answer": "1"}', r"line 1 has no 'question'"),
        (b'{"question": "a", "answer": null}', r"line 1 has nothing as 'answer'"),
        (b'{"question": "a", "answer": true}', r"line 1 has True as 'answer', which is not text"),
        (b'{"question": "a", "answer": ["1"]}', r"line 1 has \['1'\] as 'answer', which is not text"),
        (b'{"question": " ", "answer": "1"}', r"line 1 has an empty 'question'"),
        (b'{"question": [], "answer": "1"}', r"line 1: the messages in 'question' do not end with one of the user's"),
        (b'{"question": ["a"], "answer": "1"}', r"line 1 has 'a' in 'question', which is no message"),
        (b'{"question": [{"role": "user", "content": [1]}], "answer": "1"}', r"line 1 has \[1\] as 'question.content'"),
        (b'{"question": "a\\ud800b", "answer": "1"}', r"line 1 has half a character \('\\ud800', a lone surrogate\)"),
        (GOOD + b'{"question"', r"line 2 is not JSON"),
        (b'{"question": ' + b"[" * 100_000, r"line 1 is not JSON that can be read: it is nested too deep"),
        (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", r"line 1 is not JSON"),
        (b'{"question": "a", "question": "b", "answer": "1"}', r"line 1 names 'question' twice"),
        (b"[1]\n", r"line 1 is not an object with columns"),
        (LINES.encode("latin-1"), r"line 2 is not UTF-8 text .*: save the file as UTF-8"),
        (LINES.encode("utf-16"), r"bad.jsonl is UTF-16 text; make it UTF-8: iconv"),
        (b"", r"bad.jsonl has no rows"),
        (b"\n\n", r"bad.jsonl has no rows"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.txt", b"", "rows.txt is none of the formats jsonl, jsonl.gz, json"),
        ("rows.parquet", b"not parquet", "rows.parquet is not a Parquet file"),
        ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz cannot be read"),
        ("rows.json", b'{"question": "a", "answer": "1"}', "rows.json is not an array of rows"),
        ("rows.json", b'[{"question": "a", "answer": "1"}, 5]', "rows.json, row 2 is not an object"),
        ("rows.json", b"[", "rows.json is not JSON"),
        ("rows.csv", b'question,answer\na,1\n"b\n', "rows.csv, line 3 is not CSV"),
        ("rows.csv", b"question,answer\na,1\nb\n", "rows.csv, line 3 has nothing as 'answer'"),
        ("rows.csv", b"question,answer\na,1\nb, 2 or 3?,1\n", "rows.csv, line 3 has more fields than line 1 has col"),
        ("rows.csv", b"question,answer,answer\na,1,2\n", "rows.csv, line 1 names the column 'answer' twice"),
        ("rows.csv", "question,answer\na,1\n\u00e4,1\n".encode("latin-1"), "rows.csv, line 3 is not UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_no_such_place(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no file or directory .*nowhere .*dataset_path.$"):
        read(tmp_path / "a" / "b" / "nowhere")
    monkeypatch.chdir(tmp_path)
    config = load_job_config(["--training.dataset_path", "org/problems"])
    with pytest.raises(
        ValueError, match="there is no .*hf download org/problems --repo-type dataset --local-dir problems"
    ):
        read(config.training.dataset_path)


def test_gsm8k_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"cannot load openai/gsm8k .* dataset_path"):
        read(GSM8K_HUB_ID)
