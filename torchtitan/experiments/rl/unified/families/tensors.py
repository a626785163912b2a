# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A checkpoint's tensors against those of the model that it is to be."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.hf_storage import _HFStorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torchtitan.experiments.rl.unified.families.base import PolicyModel
from torchtitan.experiments.rl.unified.families.files import CheckpointFiles, DTYPES, load_tensors, read_checkpoint

__all__ = ["check_finite", "check_weights", "find_weights", "ListedReader", "load_matched", "match"]

# Computed from config.json, and stored by older versions of transformers and torchtitan.
ROTARY_BUFFERS = ("rotary_emb.inv_freq", "rope.freqs", "freqs_cis", "rope_cache")
QUANTISED = (
    "weight_scale",
    "weight_scale_inv",
    "input_scale",
    "qweight",
    "qzeros",
    "scales",
    "absmax",
    "weight_packed",
)
# What tools put before every name -> how it comes off.
PREFIXES = {
    "_orig_mod.": "torch.compile put it there: save the state dict of model._orig_mod",
    "module.": "DistributedDataParallel put it there: save the state dict of model.module",
    "base_model.model.": "peft put it there: save the model after merge_and_unload()",
}
SHOWN = 3


def match(
    checkpoint: CheckpointFiles,
    expected: Mapping[str, tuple[int, ...]],
    tied: Iterable[tuple[str, str]] = (),
) -> dict[str, str]:
    """Name in the checkpoint of each tensor that the model expects; reads data of tied tensors alone.

    Args:
        checkpoint: as `read_checkpoint` found it.
        expected: shapes by name, in the names of the checkpoint's kind.
        tied: pairs that are one tensor in the model; the checkpoint may hold either, or both if they are equal.

    Raises:
        ValueError: one line: names, shapes or dtypes that are not the model's, and what to do.
    """
    stored = {name: each for name, each in checkpoint.tensors.items() if not name.endswith(ROTARY_BUFFERS)}
    expected, names = dict(expected), {}
    _check_kind(checkpoint, stored, expected)
    for kept, other in tied:
        shape = expected.get(kept, expected.get(other))
        if other in expected or other in stored:
            expected[other] = shape
        if kept in stored and other in stored:
            _check_equal(checkpoint, kept, other)
        elif other in stored:
            names[kept] = other
        elif kept in stored and other in expected:
            names[other] = kept
    missing = sorted(expected.keys() - stored.keys() - names.keys())
    extra = sorted(stored.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & stored.keys() if stored[name].shape != tuple(expected[name]))
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if extra:
        problems.append(f"it holds {_some(extra)}, which the model has not")
    if misshapen:
        shown = [f"{name} {list(stored[name].shape)} where {list(expected[name])} is expected" for name in misshapen]
        problems.append(f"it holds {_some(shown)}")
    if problems:
        raise ValueError(f"{checkpoint.path} holds another model than its config.json says: {'; '.join(problems)}")
    return {name: names.get(name, name) for name in expected}


def find_weights(model: PolicyModel, path: str | Path) -> tuple[CheckpointFiles, dict[str, str]]:
    """The checkpoint in the directory `path`, and `match`'s answer for the model.

    The names are Hugging Face's if the checkpoint has those, else the TrainSpec model's own.
    """
    checkpoint = read_checkpoint(path)
    with torch.device("meta"):
        state, pair = model.build().state_dict(), ("tok_embeddings.weight", "output.weight")
    if checkpoint.kind == "hf":
        state = model.train_spec().state_dict_adapter(model.args, None).to_hf(state)
        pair = ("model.embed_tokens.weight", "lm_head.weight")
    tied = [pair] if getattr(model.args, "enable_weight_tying", False) else []
    return checkpoint, match(checkpoint, {name: tuple(tensor.shape) for name, tensor in state.items()}, tied)


def check_weights(model: PolicyModel, path: str | Path) -> CheckpointFiles:
    """The checkpoint in the directory `path`, if it is the model's, and every value of it a number.

    Raises:
        ValueError: one line: what is wrong with which file, tensor or name.
    """
    checkpoint, names = find_weights(model, path)
    for _ in load_matched(checkpoint, names):
        pass
    return checkpoint


def load_matched(checkpoint: CheckpointFiles, names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The expected names of `match`'s answer and their tensors; each is looked at by `check_finite`."""
    wanted: dict[str, list[str]] = {}
    for name, stored in names.items():
        wanted.setdefault(stored, []).append(name)
    for stored, tensor in load_tensors(checkpoint, wanted):
        check_finite(stored, tensor)
        yield from ((name, tensor) for name in wanted[stored])


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError if one of the tensor's values is NaN or infinite; one pass, no copy."""
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor.detach())):
        raise ValueError(
            f"the checkpoint's {name} holds NaN or infinite values: its training had diverged; take another"
        )


class ListedReader(HuggingFaceStorageReader):
    """torch's reader of safetensors, for a `dcp.load` over any sharding, of the matched tensors and no others.

    Args:
        checkpoint: of kind "hf" or "titan".
        names: `match`'s answer.
    """

    def __init__(self, checkpoint: CheckpointFiles, names: Mapping[str, str]) -> None:
        super().__init__(str(checkpoint.path))
        self.checkpoint, self.names = checkpoint, names

    def read_metadata(self) -> Metadata:
        state, places = {}, {}
        for name, stored in self.names.items():
            found = self.checkpoint.tensors[stored]
            shape, origin = torch.Size(found.shape), torch.Size([0] * len(found.shape))
            properties = TensorProperties(dtype=found.dtype)
            state[name] = TensorStorageMetadata(properties, shape, [ChunkStorageMetadata(origin, shape)])
            places[MetadataIndex(name, origin)] = _HFStorageInfo(str(found.file), shape, found.dtype)
        return Metadata(state, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))

    def _process_read_request(self, f: Any, req: Any, planner: Any) -> None:
        ends = (offset + length for offset, length in zip(req.storage_offsets, req.lengths, strict=True))
        part = tuple(slice(start, end) for start, end in zip(req.storage_offsets, ends, strict=True))
        stored = self.names[req.storage_index.fqn]
        tensor = f.get_slice(stored)[part]
        check_finite(stored, tensor)
        target = planner.resolve_tensor(req).detach()
        target.copy_(tensor)
        planner.commit_tensor(req, target)


def _check_kind(checkpoint: CheckpointFiles, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError if the names are of something that has to be converted first."""
    path = checkpoint.path
    if adapter := sorted(name for name in stored if ".lora_" in name):
        raise ValueError(f"{path} holds an adapter ({_some(adapter)}): merge it into its base model and save that")
    if scales := sorted(name for name in stored if name.endswith(QUANTISED)):
        raise ValueError(f"{path} is quantised (it holds {_some(scales)}): take the unquantised checkpoint")
    if odd := sorted(name for name, found in stored.items() if found.dtype not in DTYPES.values()):
        raise ValueError(f"{path} stores {_some(odd)} in a format that is not one of float32, bfloat16, float16")
    for name in stored:
        for prefix, remedy in PREFIXES.items():
            if name.startswith(prefix):
                raise ValueError(f"{path} holds {name}, with a prefix {prefix!r}: {remedy}")
    bare = sorted(name for name in stored if f"model.{name}" in expected)
    if bare and not any(name.startswith("model.") for name in stored):
        raise ValueError(
            f"{path} holds {_some(bare)}: without `model.` in front it is the model inside of the causal "
            "language model; save the whole of that (transformers: AutoModelForCausalLM, then save_pretrained)"
        )


def _check_equal(checkpoint: CheckpointFiles, kept: str, other: str) -> None:
    one, two = (tensor for _, tensor in load_tensors(checkpoint, (kept, other)))
    if one.dtype != two.dtype or not torch.equal(one, two):
        raise ValueError(
            f"{checkpoint.path} holds {kept} and {other}, and they differ, but config.json says that they are one "
            "(tie_word_embeddings = true): set it to false, or delete the one that is not meant"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
