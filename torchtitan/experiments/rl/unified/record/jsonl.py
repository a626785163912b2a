# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Files of JSON objects, one a line, that a crash leaves readable."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file (none if there is no file), without a last line that was cut off in the middle of writing.

    Raises:
        ValueError: a line before that is no object with a "step"; names file and line.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                problem = "" if isinstance(row, dict) and isinstance(row.get("step"), int) else "no object with a step"
            except ValueError as error:
                problem = str(error)
            if problem:
                raise ValueError(f"{path} line {number} is not a record of a step ({problem}): mend it or move it away")
            yield row


def rewrite(path: Path, rows: Iterable[dict[str, Any]]) -> TextIO:
    """Replaces the file by `rows` (which may be read from it) and returns it open for more.

    A crash leaves the old file or the new one.
    """
    draft = path.with_suffix(".tmp")
    file = open(draft, "w")
    for row in rows:
        file.write(json.dumps(row) + "\n")
    _to_disk(file)
    draft.rename(path)
    return file


def append(file: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    """Adds `rows`; they are on the disk when this returns. OSError names the file."""
    try:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        _to_disk(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def _to_disk(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
