# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The one door to torch's distributed checkpoints on disk: read without running anything that is in them.

torch unpickles a checkpoint's index (`.metadata`) and its entries that are no tensors, and a pickle can call anything.
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import filesystem as torch_filesystem, FileSystemReader, metadata as torch_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner, DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.serialization import _get_layout

__all__ = ["load", "load_alone", "load_everything", "missing_data", "read_metadata", "reason"]

# What an index is made of: torch's own names for its parts, and a few of the standard library's.
_KNOWN = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        *(getattr(torch_metadata, name) for name in torch_metadata.__all__),
        torch_metadata._MEM_FORMAT_ENCODING,
        torch_filesystem._StorageInfo,
        torch_filesystem._StoragePrefix,
        _get_layout,
        torch.Size,
        OrderedDict,
        PosixPath,
    )
}


# The one written in Python: C's makes room for as many objects as a flipped bit asks for.
class _Unpickler(pickle._Unpickler):  # pyrefly: ignore [invalid-inheritance]
    """Knows the parts of an index, and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that a checkpoint's index holds")


def read_metadata(path: str | Path) -> Metadata:
    """The index of a checkpoint directory.

    Raises:
        ValueError: it is not there, is damaged, or holds what no index does. Nothing of it was run.
    """
    file = Path(path) / ".metadata"
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        _check(metadata)
    # Damaged bytes are instructions as well: there is no telling what error they end in.
    except Exception as error:
        raise ValueError(f"{file} is unreadable: {type(error).__name__}: {error}") from None
    return metadata


def missing_data(path: Path, metadata: Metadata) -> str:
    """Which of the files that the index of the directory `path` speaks of is missing or too short; "" if none is."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size is None or size < end:
            return f"{name} is {'missing' if size is None else f'truncated, {size} of {end} bytes'}"
    return ""


def reason(error: CheckpointException) -> str:
    """What went wrong on the first rank that complained, in one line."""
    cause = next(iter(error.failures.values()))[0]
    # torch's words for damaged data advise to load them with nothing checked.
    if isinstance(cause, pickle.UnpicklingError):
        return "the data of an entry are damaged"
    return " ".join(f"{type(cause).__name__}: {cause}".split())


class Reader(FileSystemReader):
    """torch's reader of checkpoints, with an index by `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(self.path)
        metadata.storage_meta = metadata.storage_meta or torch_metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """torch's planner, which takes numbers, words and containers of them for entries that are no tensors."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        super().load_bytes(read_item, _harmless(value))


class _WholePlanner(_EmptyStateDictLoadPlanner):
    """The same, for everything that a checkpoint holds."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        super().load_bytes(read_item, _harmless(value))


def load(state_dict: dict[str, Any], path: str | Path) -> None:
    """Loads the entries of `state_dict` in place, each rank its shards; collective where there is a process group.

    Raises:
        CheckpointException: torch's, with what went wrong on each rank.
    """
    torch_dcp.load(state_dict, storage_reader=Reader(path), planner=_Planner())


def load_alone(state_dict: dict[str, Any], path: str | Path) -> None:
    """Loads whole tensors and other entries in place, in this process alone.

    Raises:
        ValueError: they cannot be read.
    """
    try:
        torch_dcp.load(state_dict, storage_reader=Reader(path), planner=_Planner(), no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}") from None


def load_everything(path: str | Path) -> dict[str, Any]:
    """All that a checkpoint holds, in this process alone; same errors as `load`."""
    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=Reader(path), planner=_WholePlanner(), no_dist=True)
    return state


def _harmless(value: io.BytesIO) -> io.BytesIO:
    """`value` again, once torch has seen that it holds none but harmless types."""
    torch.load(value, weights_only=True)
    value.seek(0)
    return value


def _check(metadata: Any) -> None:
    """Raises TypeError or ValueError unless everything in the index is of the kind that it should be."""
    _expect(metadata, Metadata)
    for name, entry in _expect(metadata.state_dict_metadata, dict).items():
        _expect(name, str)
        if not isinstance(entry, TensorStorageMetadata):
            _expect(entry, torch_metadata.BytesStorageMetadata)
            continue
        _expect(_expect(entry.properties, torch_metadata.TensorProperties).dtype, torch.dtype)
        shape = _sizes(entry.size)
        for chunk in _expect(entry.chunks, list):
            offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
            ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
            if any(end > size for end, size in zip(ends, shape, strict=True)):
                raise ValueError(f"a piece of {name} lies outside of it")
    for key, place in _expect(metadata.storage_data, dict).items():
        _expect(_expect(key, torch_metadata.MetadataIndex).fqn, str)
        if key.offset is not None:
            _sizes(key.offset)
        _sizes((_expect(place, torch_filesystem._StorageInfo).offset, place.length))
        # Its files lie beside it.
        file = _expect(place.relative_path, str)
        if file in ("", "..") or file != Path(file).name or place.transform_descriptors:
            raise ValueError(f"{key.fqn} is said to lie in {file!r}")
    for name, parts in _expect(metadata.planner_data or {}, dict).items():
        _expect(name, str)
        for part in _expect(parts, tuple):
            _expect(part, (str, int))
    if metadata.storage_meta is not None:
        _expect(metadata.storage_meta, torch_metadata.StorageMeta)


def _expect(value: Any, cls: type | tuple[type, ...]) -> Any:
    if not isinstance(value, cls):
        raise TypeError(f"a {type(value).__name__} where the index has another kind")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if any(type(size) is not int or size < 0 for size in _expect(value, tuple)):
        raise ValueError(f"{value} are no sizes")
    return value
