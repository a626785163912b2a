# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rows of a question and its answer, from the files that people have them in.

Only the two columns are looked at, so that no other can keep a file from being read. A row that cannot be used is
refused by its file and its line (its row, where the format has no lines), both counted from 1.
"""

import csv
import glob
import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.dataset
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from pyarrow import ArrowException, parquet

GSM8K_HUB_ID = "openai/gsm8k"
FORMATS = ("jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet")


@dataclass(frozen=True)
class Row:
    """A question and its answer.

    Attributes:
        place: file and line, for messages.
        messages: the conversation up to the answer, each with "role" and "content"; a mere question is one of "user".
        answer: as the file has it; a number is written out.
    """

    place: str
    messages: tuple[dict[str, str], ...]
    answer: str


def read_rows(path: str, split: str, question_column: str, answer_column: str) -> list[Row]:
    """All rows of `path`.

    Args:
        path: a file of one of FORMATS; a pattern of them ("data/train-*.parquet"); a directory that has files of
            `split`, itself or in "data", "main" or a folder of the split's name; what `datasets` saved to disk; or
            GSM8K_HUB_ID (arXiv:2110.14168), which is looked for in the Hub's cache and on the Hub.
        split: "train" or "test".
        question_column: text, or a list of messages; "a.b" is the field b of the column a.
        answer_column: text or a number; likewise.

    Raises:
        ValueError: no such path, no rows, or one that cannot be read or used: names it.
    """
    columns = [name for column in (question_column, answer_column) for name in (column, column.split(".")[0])]
    rows = []
    for place, values in _values(path, split, columns):
        if isinstance(values, ValueError):
            raise ValueError(f"{place} {values}")
        question, answer = (_field(place, values, column) for column in (question_column, answer_column))
        rows.append(Row(place, _messages(place, question_column, question), _text(place, answer_column, answer)))
    if not rows:
        raise ValueError(f"{path} has no rows for split {split!r}")
    return rows


def download_hint(name: str) -> str:
    """What to do about `name` if it may be a data set on the Hub; else nothing."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ""
    return (
        f"; a data set on the Hub is downloaded first: hf download {name} --repo-type dataset --local-dir "
        f'{name.split("/")[1]}, then [training] dataset = "local", dataset_path = "{name.split("/")[1]}"'
    )


def find_files(path: str, split: str) -> list[Path]:
    """The files that `read_rows` reads; arguments and errors as there."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if glob.has_magic(path) and (files := sorted(glob.glob(str(place)))):
        return [Path(file) for file in files]
    if not place.exists():
        hint = download_hint(os.path.relpath(path))
        raise ValueError(f"there is no file or directory {path} ([training] or [evaluation] dataset_path){hint}")
    names = [f"{split}{part}.{ending}" for ending in FORMATS for part in ("", "-*")]
    patterns = [f"{folder}{name}" for folder in ("", "data/", "main/") for name in names]
    patterns += [f"{split}/*.{ending}" for ending in FORMATS]
    found = {pattern: files for pattern in patterns if (files := sorted(place.glob(pattern)))}
    if len(found) > 1:
        raise ValueError(f"directory {path} has {' and '.join(found)}: name the one to read in dataset_path")
    for files in found.values():
        return files
    raise ValueError(f"directory {path} has no {split}.* or {split}-*.* ({', '.join(FORMATS)}), nor has its data/")


def _values(path: str, split: str, columns: list[str]) -> Iterator[tuple[str, Any]]:
    """Place and columns of each row; an error in their place where there are none to be had."""
    if path == GSM8K_HUB_ID:
        try:
            yield from _from_dataset(path, load_dataset(path, "main", split=split), columns)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {path} ({error}); offline, set [training] dataset_path to a copy") from error
        return
    folder = Path(path).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = load_from_disk(str(folder))
        except Exception as error:  # Of many classes, plain KeyError among them.
            raise ValueError(f"{path} is no whole data set that was saved to disk: {_said(error)}") from None
        if isinstance(saved, DatasetDict) and split not in saved:
            raise ValueError(f"{path} has no split {split!r}, but {', '.join(map(str, saved))}")
        yield from _from_dataset(path, saved[split] if isinstance(saved, DatasetDict) else saved, columns)
        return
    for file in find_files(path, split):
        ending = "".join(file.suffixes[-2:] if file.suffix == ".gz" else file.suffixes[-1:])[1:]
        if ending not in FORMATS:
            raise ValueError(f"{file} is none of the formats {', '.join(FORMATS)}")
        if ending == "parquet":
            yield from _from_parquet(file, columns)
            continue
        try:
            raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{file} is UTF-16 text; make it UTF-8: iconv -f UTF-16 -t UTF-8 {file.name}")
        read = {"jsonl": _from_lines, "json": _from_array, "csv": _from_csv}[ending.removesuffix(".gz")]
        yield from read(file, raw.removeprefix(b"\xef\xbb\xbf"), columns)


def _from_dataset(path: str, dataset: Dataset, columns: list[str]) -> Iterator[tuple[str, Any]]:
    used = dataset.select_columns([column for column in dict.fromkeys(columns) if column in dataset.column_names])
    rows, number = iter(used), 0
    while True:
        try:
            row = next(rows, None)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{path}, row {number + 1} cannot be read: {_said(error)}") from None
        if row is None:
            return
        number += 1
        yield f"{path}, row {number}", row


def _from_parquet(file: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        names = parquet.read_schema(file).names
        if twice := sorted({name for name in names if names.count(name) > 1} & set(columns)):
            raise ValueError(f"{file} names the column {twice[0]!r} twice")
        # As an expression: a name with a dot in it would be taken for a field of a column.
        used = {name: pyarrow.dataset.field(name) for name in columns if name in names}
        rows = pyarrow.dataset.dataset(file, format="parquet").to_table(columns=used).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file: {_said(error)}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{file}, row {number}", row


def _from_lines(file: Path, raw: bytes, columns: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            yield f"{file}, line {number}", _parse(line, columns)


def _from_array(file: Path, raw: bytes, columns: list[str]) -> Iterator[tuple[str, Any]]:
    rows = _parse(raw, columns)
    if not isinstance(rows, list):
        problem = rows if isinstance(rows, ValueError) else "is not an array of rows"
        raise ValueError(f"{file} {problem}")
    for number, row in enumerate(rows, start=1):
        yield f"{file}, row {number}", row


def _from_csv(file: Path, raw: bytes, columns: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(raw.decode("utf-8"), newline=""), strict=True)
        names = list(reader.fieldnames or [])
        if twice := sorted({name for name in names if names.count(name) > 1} & set(columns)):
            raise ValueError(f"{file}, line 1 names the column {twice[0]!r} twice")
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if None in row:
                raise ValueError(
                    f"{place} has more fields than line 1 has columns ({len(names)}): text with a comma takes quotes"
                )
            yield place, row
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line} is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.reader.line_num} is not CSV: {error}") from None


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


class _GivenTwice(ValueError):
    """A row names one of its columns twice."""


def _parse(raw: bytes, columns: list[str]) -> Any:
    """The JSON of `raw`, or the error to be told with its place."""
    used = {name for column in columns for name in (column, *column.split("."))}

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(found := dict(pairs)) < len(names) and (twice := used & {n for n in names if names.count(n) > 1}):
            raise _GivenTwice(f"names {min(twice)!r} twice")
        return found

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=fields)
    except _GivenTwice as error:
        return error
    except UnicodeDecodeError as error:
        return ValueError(f"is not UTF-8 text ({error.reason}): save the file as UTF-8")
    except RecursionError:
        return ValueError("is not JSON that can be read: it is nested too deep")
    except ValueError as error:
        return ValueError(f"is not JSON: {error}")


def _field(place: str, row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not an object with columns")
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if isinstance(value, dict) and name in value and value[name] is None:
            raise ValueError(f"{place} has nothing as {column!r}")
        if not isinstance(value, dict) or name not in value:
            known = sorted(map(str, value)) if isinstance(value, dict) else "none"
            raise ValueError(f"{place} has no {column!r} ([data] names the columns); {name!r} is not in {known}")
        value = value[name]
    return value


def _text(place: str, column: str, value: Any) -> str:
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{place} has {repr(value)[:80]} as {column!r}, which is not text")
    if not value.strip():
        raise ValueError(f"{place} has an empty {column!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = ascii(value[error.start : error.end])
        raise ValueError(f"{place} has half a character ({broken}, a lone surrogate) in {column!r}") from None
    return value


def _messages(place: str, column: str, value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list):
        return ({"role": "user", "content": _text(place, column, value)},)
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{place} has {repr(message)[:80]} in {column!r}, which is no message (role and content)")
        if not re.fullmatch(r"\w+", message["role"], re.ASCII):
            raise ValueError(f"{place} has a message of the role {message['role'][:80]!r}, which is no name")
        if more := sorted(name for name, given in message.items() if given and name not in ("role", "content")):
            raise ValueError(
                f"{place} has a message with {more[0]!r} in {column!r}: templates here get role and content"
            )
        messages.append({"role": message["role"], "content": _text(place, f"{column}.content", message.get("content"))})
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{place}: the messages in {column!r} do not end with one of the user's")
    return tuple(messages)
