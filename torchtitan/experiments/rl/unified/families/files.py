# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Which files a checkpoint is made of, and which tensors lie in them; trainer and engine load by this one reading.

Left alone, torchtitan would take each *.safetensors of a directory, vLLM those of the index, and transformers
model.safetensors before the index.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open, SafetensorError
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.experiments.rl.unified import dcp
from torchtitan.experiments.rl.unified.config.checkpoint_path import read_json

__all__ = ["check_directory", "CheckpointFiles", "load_tensors", "read_checkpoint", "StoredTensor"]

INDEX = "model.safetensors.index.json"
DOWNLOAD = "python scripts/download_hf_assets.py --repo_id {} --local_dir assets/hf --all"
LFS_POINTER = b"version https://git-lfs"
# As safetensors calls them; no policy is stored in what else it knows (8 bits and fewer, integers).
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        file: that holds it; the directory, for one that DCP has spread over files.
        dtype: None: none that a policy can have.
        shape: of the whole tensor.
    """

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint directory's weights.

    Attributes:
        path: the directory.
        kind: "hf" and "titan" are safetensors, with Hugging Face's and TorchTitan's names; "dcp" is what
            torch.distributed.checkpoint writes, with TorchTitan's names.
        files: all that the weights are read from, and nothing else.
        tensors: the model's, by the names they have there (an optimizer's are not among them).
    """

    path: Path
    kind: Literal["hf", "titan", "dcp"]
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]


def read_checkpoint(path: str | Path) -> CheckpointFiles:
    """What lies in a checkpoint directory, from headers alone.

    An index says which files there are; without one there must be exactly one *.safetensors.

    Raises:
        ValueError: one line: no checkpoint is there, which file is not whole, or of what kind that cannot be trained.
    """
    path = Path(path)
    check_directory(path)
    if (path / ".metadata").exists():
        if found := sorted(file.name for file in path.glob("*.safetensors")):
            raise ValueError(f"{path} holds both a DCP checkpoint (.metadata) and {', '.join(found)}: move one away")
        return _read_dcp(path)
    placed = _indexed(path) if (path / INDEX).exists() else dict.fromkeys([_only_file(path)])
    tensors: dict[str, StoredTensor] = {}
    for file, names in placed.items():
        found = _read_header(file)
        if names is not None and (odd := sorted(names ^ found.keys())):
            where = f"is not in {file.name}" if odd[0] in names else f"is in {file.name} and not there by the index"
            raise ValueError(f"{path / INDEX} does not fit its files: {odd[0]} {where}{_and_more(odd)}")
        tensors |= found
    kind = "titan" if "tok_embeddings.weight" in tensors else "hf"
    return CheckpointFiles(path, kind, tuple(placed), tensors)


def load_tensors(checkpoint: CheckpointFiles, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each, in the dtype it is stored in; those of safetensors are views of the mapped file.

    Args:
        checkpoint: as `read_checkpoint` found it.
        names: of the tensors to load; None: all.

    Raises:
        ValueError: what was found is not there any more, or is damaged.
    """
    wanted = set(checkpoint.tensors if names is None else names)
    if checkpoint.kind == "dcp":
        entries = {name: checkpoint.tensors[name] for name in checkpoint.tensors if name in wanted}
        state = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
        dcp.load_alone(state, checkpoint.path)
        yield from state.items()
        return
    for file in checkpoint.files:
        with _opened(file) as opened:
            for name in opened.keys():
                if name in wanted:
                    yield name, opened.get_tensor(name)


def check_directory(path: Path) -> None:
    """Raises ValueError for what is no directory, or one that holds something else than a whole model's weights."""
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{path} is a file: name the directory that it lies in")
        hint = f"; if it is the name of a model on a hub, first: {DOWNLOAD.format(os.path.relpath(path))}"
        name = Path(os.path.relpath(path))
        looks_remote = len(name.parts) == 2 and ".." not in name.parts and not name.parent.exists()
        raise ValueError(
            f"no checkpoint directory {path}{hint if looks_remote else ': see scripts/download_hf_assets.py'}"
        )
    for file in sorted(path.iterdir()):
        if problem := _no_file(file):
            raise ValueError(f"{file} {problem}")
        if file.is_dir():
            continue
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(
                    f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
                )
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{path} holds an adapter (adapter_config.json): merge it into its base model (peft's merge_and_unload) "
            "and save that"
        )
    if (path / "hf_quant_config.json").exists():
        raise ValueError(f"{path} is quantised (hf_quant_config.json): take the unquantised checkpoint")


def _no_file(file: Path) -> str:
    """What is wrong with what a checkpoint holds under this name; empty: nothing. Reading a pipe would hang."""
    if file.is_symlink() and not file.exists():
        return f"is a link to {os.readlink(file)}, and nothing is there: fetch it again"
    if file.is_dir():
        named = file.suffix in (".safetensors", ".json", ".jinja")
        return "is a directory, and its name is that of a file of the checkpoint: move it away" if named else ""
    return "" if file.is_file() else "is a pipe, a socket or a device, and no file: move it away"


def _only_file(path: Path) -> Path:
    """The one *.safetensors of a directory without an index."""
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{path} holds {len(found)} files of weights and no {INDEX} that says which count: "
            f"{', '.join(file.name for file in found)}. Leave the model's own, or add its index"
        )
    others = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf", ".ckpt"))
    if others:
        raise ValueError(
            f"{path} holds no *.safetensors, only {', '.join(others)}: convert them (transformers: "
            "from_pretrained, then save_pretrained)"
        )
    names = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    raise ValueError(f"{path} is no checkpoint: there are no *.safetensors and no .metadata in it, only {names}")


def _indexed(path: Path) -> dict[Path, set[str]]:
    """The files that the index names, with the tensors that it places in them."""
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    try:
        if not isinstance(weight_map, dict):
            raise ValueError("it has no weight_map, which says what lies in which file")
        placed: dict[Path, set[str]] = {}
        for name, file in sorted(weight_map.items()):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{name} lies in {file!r}, which is no *.safetensors beside it")
            placed.setdefault(path / file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index: {_one_line(error)}") from None
    if not placed:
        raise ValueError(f"{index} names no tensor")
    if absent := sorted(file.name for file in placed if not file.is_file()):
        raise ValueError(f"{index} names {', '.join(absent)}, and there is no such file: is the download complete?")
    return placed


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one *.safetensors; its length is held against its header."""
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}
        return {
            name: StoredTensor(file, DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        size = f"{file.stat().st_size} bytes" if file.exists() else "not there"
        raise ValueError(f"{file} ({size}) is no whole safetensors file: {_one_line(error)}; fetch it again") from None


def _read_dcp(path: Path) -> CheckpointFiles:
    metadata = dcp.read_metadata(path)
    if problem := dcp.missing_data(path, metadata):
        raise ValueError(f"{path} is not whole: {problem}")
    tensors = {
        name: StoredTensor(path, entry.properties.dtype, tuple(entry.size))
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    if not tensors:
        raise ValueError(f"{path} holds no model's tensors")
    names = sorted({place.relative_path for place in metadata.storage_data.values()})
    return CheckpointFiles(path, "dcp", (path / ".metadata", *(path / name for name in names)), tensors)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
