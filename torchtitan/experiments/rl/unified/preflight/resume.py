# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a resume changes: the job's settings beside those that its checkpoint was saved under."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan.experiments.rl.unified.config.keys import FIXED
from torchtitan.experiments.rl.unified.config.load import JobConfig, toml_values
from torchtitan.experiments.rl.unified.config.schema import keys_of
from torchtitan.experiments.rl.unified.record.checkpoints import find_start, saved_task
from torchtitan.experiments.rl.unified.rollout.task import Task

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
        raise ValueError(
            f"{'; '.join(refused)}. Set {'it' if len(refused) == 1 else 'them'} back, or begin another run ([job] "
            "dump_folder) with this one's weights: [checkpoint] initial_load_path"
        )


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
            f"{file}, which says what the run was that this one goes on with, cannot be read ({error}): put it back, "
            "or begin another run ([job] dump_folder) with this one's weights: [checkpoint] initial_load_path"
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
