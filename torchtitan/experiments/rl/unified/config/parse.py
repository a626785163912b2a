# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The command line and the TOML file of a job: read, and checked key by key. Loads no torch."""

import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint_path import REPOSITORY
from .keys import REQUIRED, SAME
from .schema import describe, fits, Key, numbers, UNIONS

_CONFIG_FILE = "job.config_file"
# Of a TOML file that is not in this repository; no key: the file would set it itself.
_NAME_CODE, _TRUST = ("reward.weights", "evaluation.reward"), "trust_code"
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}


@dataclass
class Parsed:
    """What was read.

    Attributes:
        values: by path, those that are fine; the defaults are not in it.
        problems: a line each.
        failed: paths of keys whose values are not fine.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)


def parse(keys: dict[str, Key], args: list[str], default_file: Path) -> Parsed:
    """Reads the TOML file that `args` name, `default_file` without one, and over it the keys that `args` set.

    Args:
        keys: of the config, by path.
        args: `--section.key value ...`, `--section.key=value`; a list takes several words, a table pairs of them, a
            boolean none or one. `--section.no_key` is the boolean `false`. Of a single value that is given again the
            last one counts. `--trust_code` lets a file outside this repository name code.
    """
    parsed = Parsed()
    flags = _split(args, parsed)
    named = [words[0] for flag, words in flags if _path(flag) == _CONFIG_FILE and words]
    if len(named) > 1:
        parsed.problems.append(f"--{_CONFIG_FILE} is given {len(named)} times: a job has one")
        parsed.failed.add(_CONFIG_FILE)
        return parsed
    name = named[0] if named else str(default_file)
    given = {path: (f"job config {name}: {path}", value) for path, value in _read_file(name, keys, parsed).items()}
    trusted = Path(name).resolve().is_relative_to(REPOSITORY)
    for flag, words in flags:
        if _path(flag) == _TRUST and not words:
            trusted = True
        else:
            _override(flag, words, keys, given, parsed)
    for path, (label, value) in given.items():
        problem = _check(keys[path], value)
        if not problem and path in _NAME_CODE and not label.startswith("--") and not trusted:
            problem = _untrusted(value)
        if problem:
            parsed.problems.append(f"{label} = {value!r}, {problem}")
            parsed.failed.add(path)
        else:
            whole = keys[path].hint is float and isinstance(value, int)
            parsed.values[path] = float(value) if whole else value
    for path in REQUIRED:
        if not parsed.failed & {path, _CONFIG_FILE} and not given.get(path, ("", ""))[1]:
            label = given[path][0] if path in given else f"job config {name}: {path}"
            parsed.problems.append(f"{label} is not set, and has no default that would be right")
            parsed.failed.add(path)
    return parsed


def _untrusted(rewards: dict[str, float] | str) -> str:
    """What is wrong with rewards that a TOML file of anyone's names."""
    code = [name for name in ([rewards] if isinstance(rewards, str) else rewards) if "." in name or ":" in name]
    if not code:
        return ""
    return f"and {', '.join(code)} is code that would run: read it, then say --{_TRUST} or name it on the command line"


def nearest(name: str, known: list[str]) -> str:
    """A hint at the name that was meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"did you mean {close[0]!r}?" if close else ""


def _split(args: list[str], parsed: Parsed) -> list[tuple[str, list[str]]]:
    """The flags with their words. A word that begins with two dashes is a flag; `--key=--word` gives one as a value."""
    flags: list[tuple[str, list[str]]] = []
    for arg in args:
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            flags.append((flag, [value] if equals else []))
        elif flags:
            flags[-1][1].append(arg)
        else:
            parsed.problems.append(f"unexpected word {arg!r}: settings are --section.key value")
    return flags


def _path(flag: str) -> str:
    return flag[2:].replace("-", "_")


def _read_file(name: str, keys: dict[str, Key], parsed: Parsed) -> dict[str, Any]:
    try:
        with open(name, "rb") as file:
            values = tomllib.loads(file.read().decode("utf-8-sig"))
    except OSError as error:
        parsed.problems.append(f"job config {name}: {error.strerror}; give an existing file to --{_CONFIG_FILE}")
    except (ValueError, RecursionError) as error:
        parsed.problems.append(f"job config {name} is not TOML: {error}")
    else:
        return _flatten(name, values, "", keys, parsed)
    parsed.failed.add(_CONFIG_FILE)
    return {}


def _flatten(name: str, table: dict[str, Any], section: str, keys: dict[str, Key], parsed: Parsed) -> dict[str, Any]:
    """A TOML table's values by path; problems with its names."""
    found = {}
    here = [path for path in keys if not section or path.startswith(f"{section}.")]
    for key, value in table.items():
        path = f"{section}.{key}" if section else key
        if path == _CONFIG_FILE:
            parsed.problems.append(f"job config {name}: a file cannot name another in {path}; leave it out")
        elif path in keys:
            found[path] = value
        elif not any(known.startswith(f"{path}.") for known in here):
            kind, known = ("key", here) if section else ("section", sorted({p.split(".")[0] for p in keys}))
            parsed.problems.append(f"job config {name}: unknown {kind} {path!r}; {nearest(path, known)}")
        elif not isinstance(value, dict):
            text = f"{path} = {value!r}, but {path!r} is a section: write [{path}]"
            parsed.problems.append(f"job config {name}: {text}")
        else:
            found |= _flatten(name, value, path, keys, parsed)
    return found


def _override(flag: str, words: list[str], keys: dict[str, Key], given: dict[str, Any], parsed: Parsed) -> None:
    """Puts what a flag says into `given`."""
    path = _path(flag)
    section, _, name = path.rpartition(".")
    if path not in keys and name.startswith("no_") and (other := f"{section}.{name[3:]}") in keys:
        if keys[other].hint is bool and not words:
            given[other] = (flag, False)
            return
    # An entry of a table: its name may have dots and dashes.
    tables = [table for table, key in keys.items() if typing.get_origin(key.hint) is dict]
    table = next((table for table in tables if path.startswith(f"{table}.")), None)
    if table is not None:
        entry, hint = flag[len(table) + 3 :], typing.get_args(keys[table].hint)[1]
        before = given[table][1] if table in given else keys[table].default
        if len(words) != 1 or not isinstance(before, dict):
            parsed.problems.append(f"{flag}: it takes one value")
        else:
            given[table] = (f"--{table}", {**before, entry: _read(words[0], hint)})
        return
    if path not in keys:
        parsed.problems.append(f"unknown flag {flag}: {nearest(flag, [f'--{key}' for key in keys])}")
        return
    hint = keys[path].hint
    if typing.get_origin(hint) in (list, dict) and given.get(path, ("",))[0].startswith("--"):
        parsed.problems.append(f"{flag} is given twice: write all of its values after one")
        parsed.failed.add(path)
    elif words or hint is bool:
        value = _read_words(words, hint)
        if value is _NOT_ONE or value is _TWICE:
            unexpected = f"unexpected {' '.join(words[1:])!r} after {words[0]!r}; a value with spaces takes quotes"
            parsed.problems.append(f"{flag}: {unexpected if value is _NOT_ONE else 'it names one entry twice'}")
            parsed.failed.add(path)
        else:
            given[path] = (flag, value)
    elif typing.get_origin(hint) in (list, dict):
        given[path] = (flag, typing.get_origin(hint)())
    else:
        parsed.problems.append(f"{flag}: its value is missing; it must be {describe(hint)}")
        parsed.failed.add(path)


_NOT_ONE, _TWICE = object(), object()


def _read_words(words: list[str], hint: Any) -> Any:
    """The value that words on the command line stand for."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool and not words:
        return True
    if len(words) == 1 and (origin in (list, dict) or origin in UNIONS):
        value = _toml(words[0])
        if isinstance(value, (list, dict)) and fits(value, hint):
            return value
    if origin is dict and len(words) % 2 == 0:
        if len(set(words[::2])) < len(words) // 2:
            return _TWICE
        return {name: _read(word, parts[1]) for name, word in zip(words[::2], words[1::2], strict=True)}
    if origin is list:
        return [_read(word, parts[0]) for word in words]
    return _read(words[0], hint) if len(words) == 1 else _NOT_ONE


def _read(word: str, hint: Any) -> Any:
    """A word as the type it must be; as text where it cannot be that."""
    if typing.get_origin(hint) in UNIONS:
        for part in typing.get_args(hint):
            value = None if part is types.NoneType and word == "None" else _read(word, part)
            if fits(value, part) and (part is not str):
                return value
        return word
    if hint is bool:
        return _BOOLEANS.get(word, word)
    if hint in (int, float):
        try:
            return hint(word)
        except ValueError:
            return word
    return word


def _toml(word: str) -> Any:
    """What TOML reads in a word; None where it reads nothing."""
    try:
        table = tomllib.loads(f"value = {word}")
    except (ValueError, RecursionError):
        return None
    return table["value"] if len(table) == 1 else None


def _is_text(value: Any) -> bool:
    """Whether no text in a value has half a character, as arguments that are not UTF-8 have: no file could hold it."""
    if isinstance(value, (list, dict)):
        return all(map(_is_text, [*value, *(value.values() if isinstance(value, dict) else ())]))
    return not isinstance(value, str) or not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def _check(key: Key, value: Any) -> str:
    """What is wrong with a key's value; empty: nothing."""
    if not fits(value, key.hint):
        return f"but it must be {describe(key.hint)}"
    if not _is_text(value):
        return "but it must be UTF-8 text"
    if key.refused and value != key.default and not (key.path in SAME and value == SAME[key.path]):
        return f"which this trainer does not honour: {key.refused}"
    for number in numbers(value):
        if isinstance(number, float) and not math.isfinite(number):
            return "but it must be a finite number" + (f", {key.range}" if key.range else "")
        if key.range and number not in key.range:
            return f"but it must be {key.range}"
    return ""
