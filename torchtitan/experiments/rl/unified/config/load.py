# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How a job config is read, checked and written."""

import dataclasses
import os
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import tomli
import tomli_w
from torchtitan.config import JobConfig as TitanJobConfig
from torchtitan.config.job_config import Model as TitanModel
from torchtitan.config.manager import ConfigManager
from torchtitan.experiments.rl.unified.config.sections import (
    Advantage,
    Cluster,
    Data,
    Evaluation,
    Generator,
    Parity,
    PolicyLoss,
    Reward,
    RL,
    Sampling,
    Supervision,
    Trainer,
    TrajectoryQueue,
    WeightSync,
)

MODULE = "torchtitan.experiments.rl.unified.config.load"


REPOSITORY = Path(__file__).resolve().parents[5]


TRAIN_CONFIGS = Path(__file__).resolve().parents[1] / "train_configs"


# Keys that name something to read, which resolve_path looks for.
PATHS = (("model", "hf_assets_path"), ("training", "dataset_path"), ("evaluation", "dataset_path"))


@dataclass
class Model(TitanModel):
    """torchtitan's [model], which leaves to the checkpoint's config.json what the model is."""

    name: str = ""
    """Family of the model; empty: config.json's model_type says it"""

    flavor: str = ""
    """torchtitan's name for the model's shape, to be held against config.json; empty: config.json alone says it"""


@dataclass
class JobConfig(TitanJobConfig):
    """torchtitan's JobConfig with the sections of this experiment."""

    model: Model = field(default_factory=Model)

    rl: RL = field(default_factory=RL)
    data: Data = field(default_factory=Data)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    generator: Generator = field(default_factory=Generator)
    trainer: Trainer = field(default_factory=Trainer)
    trajectory_queue: TrajectoryQueue = field(default_factory=TrajectoryQueue)
    supervision: Supervision = field(default_factory=Supervision)
    cluster: Cluster = field(default_factory=Cluster)
    weight_sync: WeightSync = field(default_factory=WeightSync)
    reward: Reward = field(default_factory=Reward)
    advantage: Advantage = field(default_factory=Advantage)
    policy_loss: PolicyLoss = field(default_factory=PolicyLoss)
    parity: Parity = field(default_factory=Parity)


def load_job_config(args: list[str]) -> JobConfig:
    """Reads the TOML file that `args` names (debug_cpu.toml without one) and the CLI's overrides.

    Args:
        args: command line, torchtitan's flags: `--job.config_file X.toml`, `--section.key value`.

    Raises:
        ValueError: names file, key, value and remedy for an unknown key, a wrong type or an unreadable file.
    """
    manager = ConfigManager(JobConfig)
    if not any(arg.split("=")[0] in ("--job.config_file", "--job.config-file") for arg in args):
        args = ["--job.config_file", str(TRAIN_CONFIGS / "debug_cpu.toml"), *args]
    _check_file(args)
    config = manager.parse_args(args)
    config.job.config_file, config.job.custom_config_module = None, MODULE
    for section, key in PATHS:
        if path := getattr(getattr(config, section), key):
            setattr(getattr(config, section), key, resolve_path(path))
    return config


def write_toml(config: JobConfig, path: Path) -> None:
    """Writes `config` as TOML that `--job.config_file` reads again; what is None is left out.

    Paths inside this repository are written relative to its top, so that the file serves another clone.
    """
    values = _without_none(config.to_dict())
    for section, key in (*PATHS, ("job", "dump_folder")):
        if os.path.isabs(value := values[section].get(key, "")) and Path(value).is_relative_to(REPOSITORY):
            values[section][key] = str(Path(value).relative_to(REPOSITORY))
    path.write_text(tomli_w.dumps(values))


def resolve_path(path: str) -> str:
    """Absolute `path`; a relative one that is not below the working directory is looked for in the repository."""
    path = os.path.expanduser(path)
    in_repository = REPOSITORY / path
    return os.path.abspath(path if os.path.exists(path) or not in_repository.exists() else in_repository)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _check_file(args: list[str]) -> None:
    """torchtitan's manager takes any type from a TOML file and names no file in its errors: look before it does."""
    words = [word for arg in args for word in arg.split("=", 1)]
    name = next(words[i + 1] for i, word in enumerate(words) if word in ("--job.config_file", "--job.config-file"))
    try:
        with open(name, "rb") as file:
            values = tomli.load(file)
    except OSError as error:
        raise ValueError(f"job config {name}: {error.strerror}; give an existing file to --job.config_file") from error
    except tomli.TOMLDecodeError as error:
        raise ValueError(f"job config {name} is not TOML: {error}") from error
    _check_section(name, "", JobConfig, values)


def _check_section(file: str, section: str, cls: type, values: dict[str, Any]) -> None:
    hints = typing.get_type_hints(cls, vars(sys.modules[cls.__module__]))
    known = {f.name for f in dataclasses.fields(cls)}
    for key, value in values.items():
        where = f"{section}.{key}" if section else key
        if key not in known:
            kind = "key" if section else "section"
            raise ValueError(f"job config {file}: unknown {kind} {where!r}; known here: {', '.join(sorted(known))}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"job config {file}: {where} = {value!r}, but {where!r} is a section: write [{where}]")
            _check_section(file, where, hints[key], value)
            continue
        try:
            pydantic.TypeAdapter(hints[key]).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            wanted = _describe(hints[key])
            raise ValueError(f"job config {file}: {where} = {value!r}, but it must be {wanted}") from error


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(part) for part in typing.get_args(hint) if part is not types.NoneType)
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
