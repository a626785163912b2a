# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a resume changes: the job's settings beside those that its checkpoint was saved under."""

import json
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan.experiments.rl.unified.config.checkpoint_path import read_json
from torchtitan.experiments.rl.unified.config.keys import FIXED
from torchtitan.experiments.rl.unified.config.load import JobConfig, toml_values
from torchtitan.experiments.rl.unified.config.schema import keys_of
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.record.checkpoints import find_start, saved_task
from torchtitan.experiments.rl.unified.record.provenance import read_model
from torchtitan.experiments.rl.unified.rollout.task import Task
from torchtitan.experiments.rl.unified.tokenizer import end_ids, load_tokenizer

_REMEDY = (
    "Set that back, or begin another run ([job] dump_folder) with this one's weights: [checkpoint] initial_load_path"
)
# They say where the job is and where it began, not what it does.
_PLACES = ("job.", "checkpoint.load_step", "checkpoint.initial_load")


def check_settings(config: JobConfig) -> None:
    """What a resume cannot change is what it was.

    Raises:
        ValueError: a line's text for each key: old value, new value, why, and what to do.
    """
    refused = [
        f"{path} is {_show(new)}, and was {_show(old)} in the run that this one goes on with: {FIXED[path]}"
        for path, old, new in _changes(config)
        if path in FIXED and (path != "model.hf_assets_path" or config.policy_loss.kl_weight)
    ]
    if refused:
        raise ValueError(f"{'; '.join(refused)}. {_REMEDY}")


def check_files(config: JobConfig) -> None:
    """The files in `[model] hf_assets_path` say of the model what they said when the run that is gone on with began.

    Raises:
        ValueError: names each field: old value, new value, and what to do.
    """
    run = _run_before(config)
    recorded = read_model(run / "provenance.json") if run else {}
    if "config.json" not in recorded:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, content in recorded.items():
            (Path(folder) / name).write_text(json.dumps(content), encoding="utf-8")
        before, now = (_said_of_model(config, path) for path in (folder, config.model.hf_assets_path))
    differ = [
        f"{name} is {_show(now.get(name))}, and was {_show(before.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(
            f"[model] hf_assets_path: {config.model.hf_assets_path} holds another model than that which the run began "
            f"with that this one goes on with: {'; '.join(differ)}. {_REMEDY}"
        )


def _said_of_model(config: JobConfig, folder: str) -> dict[str, Any]:
    """What makes the model, and what ends a completion, by the names of the files' fields."""
    model = model_of_checkpoint(folder, config.model.name)
    tokenizer, settings = load_tokenizer(config.model.hf_assets_path), Path(folder) / "tokenizer_config.json"
    own = read_json(settings).get("eos_token") if settings.is_file() else None
    ends = sorted(end_ids(tokenizer, folder, model.geometry.vocabulary))
    return model.family.to_hf(model.args) | {"eos_token_id": ends, "eos_token": own}


def check_position(config: JobConfig, task: Task) -> None:
    """Where the run stood is a place among the job's prompts.

    Raises:
        ValueError: says what has changed.
    """
    saved = find_start(config).saved
    state = saved_task(saved.path) if saved else {}
    if "task" in state:
        task.load_state_dict(state["task"])
        task.load_state_dict(None)


def changed_settings(config: JobConfig) -> list[str]:
    """A line for each setting of the run that this job changes from its next step on."""
    found = [
        f"this resume changes {path} from {_show(old)} to {_show(new)}"
        for path, old, new in _changes(config)
        if not path.startswith(_PLACES)
    ]
    saved, begins_with = find_start(config).saved, config.checkpoint.initial_load_path
    if saved and begins_with:
        found.append(f"[checkpoint] initial_load_path is not read again: the run goes on from its step {saved.step}")
    return found


def _changes(config: JobConfig) -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of each key that the job sets otherwise than the run whose state it takes over."""
    run = _run_before(config)
    if run is None:
        return
    file = run / "config.toml"
    try:
        old = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file}, which says what the run was that this one goes on with, cannot be read ({error}). {_REMEDY}"
        ) from None
    new = toml_values(config)
    for path, key in keys_of(JobConfig).items():
        # A key that the file has not was None, or there was none: its default then.
        before, now = (_at(values, path, key.default) for values in (old, new))
        if before != now:
            yield path, before, now


def _run_before(config: JobConfig) -> Path | None:
    """The folder of the run whose trainer state, and not only whose weights, the job begins with."""
    settings = config.checkpoint
    if find_start(config).saved:
        return Path(config.job.dump_folder)
    path = Path(settings.initial_load_path or "").absolute()
    # Exported weights have no trainer state.
    if settings.initial_load_path and not settings.initial_load_model_only and (path / ".metadata").exists():
        return path.parent.parent
    return None


def _at(values: dict[str, Any], path: str, default: Any) -> Any:
    for name in path.split("."):
        if name not in values:
            return default
        values = values[name]
    return values


def _show(value: Any) -> str:
    return "not set" if value is None else repr(value)
