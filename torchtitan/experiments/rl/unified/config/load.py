# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The job config as the package has it: torchtitan's with this folder's sections, read, and written."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from torchtitan.config import JobConfig as TitanJobConfig
from torchtitan.config.job_config import Model as TitanModel

from . import sections
from .checkpoint_path import directory_of_model, REPOSITORY, resolve_path
from .parse import parse
from .schema import build, keys_of

MODULE = "torchtitan.experiments.rl.unified.config.load"
TRAIN_CONFIGS = Path(__file__).resolve().parents[1] / "train_configs"
# Keys that name something to read, which resolve_path looks for.
PATHS = (
    *(("model", "hf_assets_path"), ("checkpoint", "initial_load_path")),
    *(("training", "dataset_path"), ("evaluation", "dataset_path")),
)

# Keys that name a folder, which may begin with "~".
FOLDERS = (("job", "dump_folder"), ("checkpoint", "initial_load_path"), ("weight_sync", "folder"))


@dataclass
class Model(sections.Model, TitanModel):
    """torchtitan's [model], which leaves to the checkpoint's config.json what the model is."""


@dataclass
class JobConfig(sections.Sections, TitanJobConfig):
    """torchtitan's JobConfig with the sections of this experiment."""

    model: Model = field(default_factory=Model)


def load_job_config(args: list[str]) -> JobConfig:
    """Reads the TOML file that `args` names (debug_cpu.toml without one) and the command line's overrides.

    A `[model] hf_assets_path` that holds weights alone becomes the directory of their model; they are where the job
    then starts from.

    Args:
        args: command line: `--job.config_file X.toml`, `--section.key value`.

    Raises:
        ValueError: a line for each unknown key, wrong type, value out of its range and key that is not honoured, with
            file or flag, value and remedy.
    """
    parsed = parse(keys_of(JobConfig), args, TRAIN_CONFIGS / "debug_cpu.toml")
    if parsed.problems:
        raise ValueError("\n".join(parsed.problems))
    config = build(JobConfig, parsed.values)
    config.job.config_file, config.job.custom_config_module = None, MODULE
    for section, key in PATHS:
        if path := getattr(getattr(config, section), key):
            setattr(getattr(config, section), key, resolve_path(path))
    for section, key in FOLDERS:
        if path := getattr(getattr(config, section), key):
            setattr(getattr(config, section), key, os.path.expanduser(path))
    weights = config.model.hf_assets_path
    if weights and (model := directory_of_model(weights)) != weights:
        config.model.hf_assets_path = model
        config.checkpoint.initial_load_path = config.checkpoint.initial_load_path or weights
    return config


def toml_values(config: JobConfig) -> dict[str, Any]:
    """`config` as `write_toml` writes it."""
    values = _without_none(config.to_dict())
    for section, key in (*PATHS, ("job", "dump_folder")):
        if os.path.isabs(value := values[section].get(key, "")) and Path(value).is_relative_to(REPOSITORY):
            values[section][key] = str(Path(value).relative_to(REPOSITORY))
    return values


def write_toml(config: JobConfig, path: Path) -> None:
    """Writes `config` as TOML that `--job.config_file` reads again; what is None is left out.

    Paths inside this repository are written relative to its top, so that the file serves another clone.
    """
    path.write_text(tomli_w.dumps(toml_values(config)), encoding="utf-8")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
