# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A checkpoint's parts: where they lie, when a job has written its weights alone, and the JSON among them.

Needs the standard library alone.
"""

import json
import os
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[5]
# From a folder of checkpoints, and from a run's.
_STEPS = ("step-*/.metadata", "*/step-*/.metadata")


def resolve_path(path: str) -> str:
    """Absolute `path`; a relative one that is not below the working directory is looked for in the repository."""
    path = os.path.expanduser(path)
    in_repository = REPOSITORY / path
    return os.path.abspath(path if os.path.exists(path) or not in_repository.exists() else in_repository)


def directory_of_model(weights: str) -> str:
    """The directory with config.json and tokenizer of the model whose weights lie in the directory `weights`.

    That is `weights` itself, but for a step that a job has saved (`checkpoint/step-N`, torch.distributed.checkpoint's
    layout): its model is the one that the config.toml of its run names.

    Raises:
        ValueError: one line: it is a folder of such steps and no step, or its run is not there any more.
    """
    folder = Path(weights)
    if (folder / "config.json").exists():
        return weights
    if not (folder / ".metadata").exists():
        if steps := [index.parent for pattern in _STEPS for index in folder.glob(pattern)]:
            newest = max(steps, key=lambda step: step.stat().st_mtime)
            raise ValueError(f"{weights} is no checkpoint, but holds some: take one of them, such as {newest}")
        return weights
    remedy = "put the model's config.json and tokenizer beside its .metadata"
    if (run := _run_of(folder)) is None:
        raise ValueError(f"{weights} holds weights alone, and the config.toml of its run is not above it: {remedy}")
    named = _setting(run, "model", "hf_assets_path")
    if named is None or not (model := Path(resolve_path(named)) / "config.json").is_file():
        raise ValueError(
            f"{weights} holds weights alone, and the model that its run's {run / 'config.toml'} names is not there "
            f"([model] hf_assets_path = {named!r}): {remedy}"
        )
    return str(model.parent)


def _run_of(step: Path) -> Path | None:
    """The folder of the run that saved its checkpoints above `step`."""
    for run in step.absolute().parents:
        folder = _setting(run, "checkpoint", "folder")
        if folder is not None and step.absolute().is_relative_to(run / folder):
            return run
    return None


def _setting(run: Path, section: str, key: str) -> str | None:
    """What the config.toml of a run's folder says; None where there is none, or another program's."""
    try:
        value = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))[section][key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ValueError: there is none, or it names a field twice, of which readers take one or the other.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found
