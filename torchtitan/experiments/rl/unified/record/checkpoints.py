# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A run's checkpoints on disk: which of them are whole, where a job starts, exports in Hugging Face layout."""

import errno
import functools
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.dcp import load_alone, missing_data, read_metadata
from torchtitan.experiments.rl.unified.errors import CheckpointError
from torchtitan.experiments.rl.unified.record.replay import differences

# torchtitan takes any name in the checkpoint folder that has "step-N" in it for a checkpoint; this one has not.
SET_ASIDE = "set_aside"


@dataclass(frozen=True)
class Saved:
    """What one step left in the checkpoint folder.

    Attributes:
        step: optimizer steps taken.
        path: its directory.
        kind: "full" can be trained on from; "model" (weights alone) and "hugging_face" (an export) cannot; "cut off"
            was still being written when its process ended; "damaged" was complete once.
        problem: of a damaged one, what is wrong.
    """

    step: int
    path: Path
    kind: Literal["full", "model", "hugging_face", "cut off", "damaged"]
    problem: str = ""


@dataclass(frozen=True)
class Start:
    """Where a job starts.

    Attributes:
        saved: the checkpoint to go on from; None for the initial weights.
        finished: the run has taken all its steps.
        notes: what was passed over, for the user.
    """

    saved: Saved | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()


def checkpoint_folder(config: JobConfig) -> Path:
    """Where the job's checkpoints lie."""
    return Path(config.job.dump_folder) / config.checkpoint.folder


def find_start(config: JobConfig) -> Start:
    """The newest whole checkpoint of the job, or the one that `[checkpoint] load_step` names. Changes nothing.

    Raises:
        ValueError: there are checkpoints, but the job cannot go on from any, or not from the one that was asked for.
    """
    if not config.checkpoint.enable:
        return Start()
    folder = checkpoint_folder(config)
    found = {saved.step: saved for saved in list_saved(folder)}
    if (step := config.checkpoint.load_step) != -1:
        if step not in found:
            there = ", ".join(map(str, found)) or "none"
            raise ValueError(f"[checkpoint] load_step {step}: {folder} has no such checkpoint; there: {there}")
        if (saved := _as_recorded(config, found[step])).kind != "full":
            raise ValueError(f"[checkpoint] load_step {step}: {_describe(saved)}")
        return Start(saved)
    for step in sorted(found, reverse=True):
        if found[step].kind == "full":
            found[step] = _as_recorded(config, found[step])
            if found[step].kind == "full":
                break
    whole = [saved for saved in found.values() if saved.kind not in ("cut off", "damaged")]
    full = [saved for saved in whole if saved.kind == "full"]
    if whole and whole[-1].step >= config.training.steps:
        return Start(full[-1] if full else None, finished=True)
    if full:
        passed_over = [saved for saved in found.values() if saved.step > full[-1].step]
        notes = [f"{_describe(saved)}; going on from step {full[-1].step}" for saved in passed_over]
        return Start(full[-1], notes=tuple(notes))
    if useless := [saved for saved in found.values() if saved.kind != "cut off"]:
        raise ValueError(
            f"no checkpoint to go on from: {'; '.join(map(_describe, useless))}. Take another [job] dump_folder, or "
            "start from weights with [checkpoint] initial_load_path or [model] hf_assets_path"
        )
    return Start(notes=tuple(f"{_describe(saved)}; starting anew" for saved in found.values()))


def prepare_folder(config: JobConfig, start: Start) -> None:
    """Clears the checkpoint folder of steps that the job is about to take (again).

    They are moved to the subfolder "set_aside", whatever they are: a step must be written into an empty directory, or a
    crash while writing could leave old and new files that look like one whole checkpoint. What looks cut off may be a
    copy that somebody made without its hidden files.
    """
    folder = checkpoint_folder(config)
    first = start.saved.step if start.saved else -1
    for saved in list_saved(folder):
        if saved.step <= first:
            continue
        (folder / SET_ASIDE).mkdir(exist_ok=True)
        number, aside = 0, folder / SET_ASIDE / saved.path.name
        while aside.exists():
            number += 1
            aside = folder / SET_ASIDE / f"{saved.path.name}.{number}"
        saved.path.rename(aside)


def list_saved(folder: Path) -> list[Saved]:
    """All that lies in a checkpoint folder, by step; [] where there is none."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*") if path.is_dir()]
    return sorted((_inspect(int(match[1]), path) for match, path in found if match), key=lambda saved: saved.step)


def check_model(path: Path, model: torch.nn.Module) -> None:
    """The checkpoint in `path` holds parameters of this model's names and shapes.

    Args:
        path: a DCP checkpoint directory.
        model: may be on the meta device.

    Raises:
        ValueError: names what differs.
    """
    entries = read_metadata(path).state_dict_metadata.items()
    saved = {
        name: tuple(entry.size)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differences = [
        f"{name}: {saved.get(name, 'missing')} in the checkpoint, {own.get(name, 'missing')} in the job's model"
        for name in sorted(saved.keys() | own.keys())
        if saved.get(name) != own.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{path} is a checkpoint of another model: {'; '.join(differences[:3])}{more}. Take another [job] "
            "dump_folder or the model that it was saved with"
        )


def complete_export(path: Path, hf_assets_path: str, dtype: str) -> None:
    """Makes a directory of exported weights a whole one in Hugging Face layout.

    Copies what lies beside the weights in `hf_assets_path` (tokenizer, generation config), and writes `config.json`
    last, with the weights' dtype: a directory without it was cut off.
    """
    shutil.rmtree(path / "sharded", ignore_errors=True)  # The ranks' shards that the weights were put together from.
    for file in Path(hf_assets_path).iterdir():
        weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf"} & set(file.suffixes)
        if file.is_file() and not weights and file.name != "config.json":
            shutil.copyfile(file, path / file.name)
    shards = sorted(path.glob("*.safetensors"))
    if [shard.name for shard in shards] != ["model.safetensors"]:  # Weights in several files come without an index.
        index = {"metadata": {}, "weight_map": {name: shard.name for shard in shards for name in _names_in(shard)}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    # transformers 5 writes "dtype", those before it "torch_dtype"; one that disagrees would convert what is loaded.
    config = json.loads((Path(hf_assets_path) / "config.json").read_text(encoding="utf-8"))
    draft = path / "config.json.tmp"
    draft.write_text(json.dumps(config | {"dtype": dtype, "torch_dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    draft.rename(path / "config.json")


def save_error(error: BaseException, step: int, folder: Path) -> CheckpointError:
    """What went wrong while `step` was saved under `folder`, in one line; deletes the directory that was cut off."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    path = folder / f"step-{step}"
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    what = f"{type(causes[0]).__name__}: {str(causes[0]).splitlines()[0] if str(causes[0]) else ''}"
    # torch's writer does not pass the system's error on: a write that the disk cut short is an "unexpected pos" to it.
    cut_short = any("unexpected pos" in str(cause) for cause in causes)
    if cut_short or free < 2**20 or any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes):
        what = f"no space left on the disk ({free} bytes free now; {what})"
    if path.is_dir() and _inspect(step, path).kind == "cut off":
        shutil.rmtree(path, ignore_errors=True)
    return CheckpointError(
        f"the checkpoint of step {step} could not be saved in {path}: {what}. Those before it are untouched: the same "
        "command goes on from the last of them"
    )


def saved_task(path: Path) -> dict[str, Any]:
    """Where the task stood, of a whole checkpoint; {} for one that torchtitan itself has written."""
    if "train_state.task" not in read_metadata(path).state_dict_metadata:
        return {}
    state = {"train_state": {"task": ""}}
    load_alone(state, path)
    return json.loads(state["train_state"]["task"])


def _as_recorded(config: JobConfig, saved: Saved) -> Saved:
    """`saved`, damaged if a byte of it is not what the run recorded when it was written."""
    record = Path(config.job.dump_folder) / "replay" / f"checkpoint-{saved.step}.json"
    stamp = max(file.stat().st_mtime_ns for file in saved.path.iterdir())
    changed = _changed(record, saved.path, stamp)
    return replace(saved, kind="damaged", problem=f"{changed} is not what was saved") if changed else saved


@functools.lru_cache(maxsize=8)
def _changed(record: Path, checkpoint: Path, stamp: int) -> str:
    """The first entry of a checkpoint that has other bytes than recorded; empty: none has, or nothing was recorded."""
    try:
        return next(iter(differences(record, checkpoint)), "")
    except ValueError:
        return ""


def _inspect(step: int, path: Path) -> Saved:
    if not (path / ".metadata").exists():
        exported = (path / "config.json").exists() and any(path.glob("*.safetensors"))
        return Saved(step, path, "hugging_face" if exported else "cut off")
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        return Saved(step, path, "damaged", str(error))
    if problem := missing_data(path, metadata):
        return Saved(step, path, "damaged", problem)
    full = any(name.startswith("train_state.") for name in metadata.state_dict_metadata)
    return Saved(step, path, "full" if full else "model")


def _names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _describe(saved: Saved) -> str:
    return (
        f"{saved.path} "
        + {
            "full": "is a whole checkpoint",
            "model": "holds the model alone ([checkpoint] last_save_model_only), no optimizer state",
            "hugging_face": "is an export in Hugging Face layout, without optimizer state",
            "cut off": "was cut off while it was written",
            "damaged": f"is damaged: {saved.problem}",
        }[saved.kind]
    )
