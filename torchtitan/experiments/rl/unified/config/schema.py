# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The keys of a job config, read off its dataclasses. Needs the standard library alone, and loads no torch."""

import ast
import dataclasses
import types
import typing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchtitan_rl_unified_hook import another_torchtitan

from .keys import REFUSED
from .ranges import Range, TORCHTITAN

UNIONS = (types.UnionType, typing.Union)


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: "section.key".
        hint: its type.
        default: its value where nobody gives one.
        range: of its numbers; None: any that are finite.
        refused: why it cannot be set; empty: it can.
        owner: the name of its dataclass.
    """

    path: str
    hint: Any
    default: Any
    range: Range | None
    refused: str
    owner: str


def keys_of(cls: type, section: str = "") -> dict[str, Key]:
    """Every key of a config dataclass by its path, in their order."""
    found = {}
    for item in dataclasses.fields(cls):
        path, hint = f"{section}.{item.name}" if section else item.name, item.type
        if dataclasses.is_dataclass(hint):
            found |= keys_of(hint, path)
            continue
        marks: tuple[Any, ...] = ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *marks = typing.get_args(hint)
        limits = next((mark for mark in marks if isinstance(mark, Range)), TORCHTITAN.get(path))
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        refused = next((REFUSED[name] for name in _with_sections(path) if name in REFUSED), "")
        found[path] = Key(path, hint, default, limits, refused, cls.__name__)
    return found


def build(cls: type, values: dict[str, Any], section: str = "") -> Any:
    """The config that `values`, by path, and the defaults make."""
    given = {}
    for item in dataclasses.fields(cls):
        path = f"{section}.{item.name}" if section else item.name
        if dataclasses.is_dataclass(item.type):
            given[item.name] = build(item.type, values, path)
        elif path in values:
            given[item.name] = values[path]
    return cls(**given)


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint` as TOML has it: whole numbers are floats, too, booleans are no numbers."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return isinstance(value, str) and value in parts
    if origin in UNIONS:
        return any(fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, parts[1]) for item in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def describe(hint: Any) -> str:
    """A type as an error names it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in parts)
    if origin in UNIONS:
        return " or ".join(describe(part) for part in parts if part is not types.NoneType)
    return hint.__name__ if isinstance(hint, type) and not parts else str(hint)


def numbers(value: Any) -> list[int | float]:
    """The numbers in a key's value."""
    if isinstance(value, (list, dict)):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def titan_source() -> Path:
    """The file with torchtitan's section definitions; finding it imports nothing."""
    spec = find_spec("torchtitan")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package torchtitan is not installed in this Python: run bash scripts/setup_env.sh")
    if problem := another_torchtitan(spec.submodule_search_locations[0]):
        raise ValueError(problem)
    for folder in spec.submodule_search_locations:
        if (path := Path(folder) / "config" / "job_config.py").exists():
            return path
    raise ValueError(f"{spec.submodule_search_locations[0]} has no config/job_config.py: run bash scripts/setup_env.sh")


def titan_job_config() -> type:
    """torchtitan's JobConfig, without its package, whose import loads torch: the definitions themselves need none."""
    source = titan_source()
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not _imports_heavy(node)]
    module = types.ModuleType("torchtitan_job_config")
    exec(compile(tree, str(source), "exec"), vars(module))
    return module.JobConfig


def documentation(source: Path) -> dict[tuple[str, str], str]:
    """The docstring below each field of the dataclasses in a file, by class and field, in one line."""
    found = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for item, after in zip(node.body, node.body[1:]):
                if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
                    if isinstance(after.value, ast.Constant) and isinstance(item.target, ast.Name):
                        found[node.name, item.target.id] = " ".join(str(after.value.value).split())
    return found


def _with_sections(path: str) -> list[str]:
    """The path and the sections it lies in."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _imports_heavy(node: ast.stmt) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(name.split(".")[0] in ("torch", "torchtitan") for name in names)
