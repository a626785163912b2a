# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a command says of its arguments before it imports anything that takes time. Loads no torch."""

import os
import sys
import textwrap
import warnings
from dataclasses import field, make_dataclass
from pathlib import Path

from . import sections
from .checks import contradictions
from .parse import parse
from .schema import build, documentation, keys_of, titan_job_config, titan_source
from .streams import drop_unread_streams, unbroken_streams

__all__ = ["check_arguments", "drop_unread_streams", "help_text", "prepare_process", "unbroken_streams"]

_DEFAULT = Path(__file__).resolve().parents[1] / "train_configs" / "debug_cpu.toml"


# With them an OpenMP runtime pins the process that loads it, and each of a job's to the same cores.
_PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def prepare_process() -> None:
    """Before torch is loaded: drops what would end or pin a process that loads it.

    [trainer] and [generator] cores place a job's processes. A warning of a library is no error of the job's.

    Raises:
        ValueError: the working directory has been deleted.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the working directory has been deleted: change to another") from None
    if any(option.startswith("error") for option in sys.warnoptions):
        sys.warnoptions.clear()
        os.environ["PYTHONWARNINGS"] = "ignore"
        warnings.simplefilter("ignore")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # [generator] kv_cache_gib says it.
    pinned = [os.environ.pop(name) for name in _PINNING if name in os.environ]
    if pinned and "torch" in sys.modules:  # As of `python -m`: it has happened.
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))


def check_arguments(args: list[str]) -> None:
    """What is wrong with the arguments and the TOML file that they name, found in a fraction of a second.

    Raises:
        ValueError: a line for each unknown key, wrong type, value out of its range, key that is not honoured, and keys
            that contradict each other.
    """
    config_class = _config_class()
    parsed = parse(keys_of(config_class), args, _DEFAULT)
    problems = list(parsed.problems)
    # Without a file the device decides which one is the default; it is asked later.
    if (problems or "job.config_file" in parsed.values) and "job.config_file" not in parsed.failed:
        problems += contradictions(build(config_class, parsed.values), parsed.failed)
    if problems:
        raise ValueError("\n".join(problems))


def help_text(usage: str) -> str:
    """`usage`, and every key that can be set, with its default and what it does."""
    documents = documentation(titan_source()) | documentation(Path(sections.__file__))
    lines, section = [usage], ""
    for key in keys_of(_config_class()).values():
        if key.refused:
            continue
        if (name := key.path.rpartition(".")[0]) != section:
            section = name
            lines.append(f"\n[{section}]")
        limits = f" ({key.range})" if key.range else ""
        text = f"{documents.get((key.owner, key.path.rpartition('.')[2]), '')}{limits}".strip()
        lines.append(f"  --{key.path} {_toml(key.default)}")
        lines.extend(textwrap.wrap(text, 112, initial_indent="      ", subsequent_indent="      "))
    lines.append("\nWhat else torchtitan's job config has is refused, by name. --section.no_key is the boolean false.")
    return "\n".join(lines)


def _config_class() -> type:
    """As load.JobConfig."""
    titan = titan_job_config()
    model = make_dataclass("Model", [], bases=(sections.Model, type(titan().model)))
    return make_dataclass(
        "JobConfig", [("model", model, field(default_factory=model))], bases=(sections.Sections, titan)
    )


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return " ".join(f"{name} {_toml(item)}" for name, item in value.items()) or "{}"
    if isinstance(value, list):
        return " ".join(map(_toml, value)) or "[]"
    return repr(value) if isinstance(value, str) else str(value)
