# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a run keeps so that a step can be checked later: sampled tokens with their log-probs, and checkpoints' digests.

In the run's folder `replay/`: `step-N.safetensors` for each step N whose tokens were sampled with weights that a
checkpoint holds (or with the initial weights), and `checkpoint-V.json` for each checkpoint, V = 0 for the initial one.
A step takes 8 bytes a sampled token, 4 bytes a prompt token and about 30 bytes a completion. What belongs to a
checkpoint that `[checkpoint] keep_latest_k` has removed is removed with it.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.dcp import read_metadata
from torchtitan.experiments.rl.unified.messages import Request, Trajectory


class ReplayFolder:
    """The folder `replay/` of a run.

    Args:
        config: the job; `job.dump_folder` is the run's folder.
        first_step: the run stands at this step, loaded from a checkpoint unless it is 0.
    """

    def __init__(self, config: JobConfig, first_step: int = 0) -> None:
        self.config = config
        self.first_step = first_step
        self.folder = Path(config.job.dump_folder) / "replay"

    def record(self, step: int, trajectories: list[Trajectory]) -> None:
        """Keeps what step `step` was trained on, if it can be replayed, and the digests of finished checkpoints."""
        if all(self._is_saved(version) for version in {t.policy_version for t in trajectories}):
            self.folder.mkdir(exist_ok=True)
            save_trajectories(trajectories, self._step(step))
        self.record_checkpoints()

    def record_checkpoints(self) -> None:
        """Writes the digests of checkpoints that are complete and have none yet; drops what belongs to removed ones."""
        self.folder.mkdir(exist_ok=True)
        for version in self.checkpoints():
            file = self._checkpoint(version)
            # The trainer may remove an old checkpoint meanwhile.
            if not file.exists() and (digests := _read_or_none(self.checkpoint(version))):
                draft = file.with_suffix(".tmp")
                draft.write_text(json.dumps(digests, indent=0) + "\n")
                draft.rename(file)
        for version, file in _numbered(self.folder, r"checkpoint-(\d+)\.json"):
            if version and not self.checkpoint(version).exists():
                for step, tokens in _numbered(self.folder, r"step-(\d+)\.safetensors"):
                    if version in (versions_of(tokens) or ()):
                        tokens.unlink()
                file.unlink()

    def rewind(self, step: int) -> None:
        """Forgets what came after `step`."""
        self.first_step = step
        for pattern in (r"step-(\d+)\.safetensors", r"checkpoint-(\d+)\.json"):
            for number, file in _numbered(self.folder, pattern):
                if number > step:
                    file.unlink()

    def steps(self) -> list[int]:
        """Steps that can be replayed: their tokens are here, and so is the checkpoint of each version they need."""
        have = set(self.checkpoints())
        found = _numbered(self.folder, r"step-(\d+)\.safetensors")
        return [step for step, file in found if (needed := versions_of(file)) and needed <= have]

    def trajectories(self, step: int) -> list[Trajectory]:
        """What step `step` was trained on.

        Raises:
            ValueError: it cannot be replayed; says which steps can.
        """
        if step not in (steps := self.steps()):
            kept = self._step(step).exists()
            missing = "nothing was recorded for it" if not kept else "its checkpoint is gone"
            if kept and versions_of(self._step(step)) is None:
                missing = f"{self._step(step)} is damaged"
            listed = ", ".join(map(str, steps)) or "none (is [checkpoint] enable on?)"
            raise ValueError(f"step {step} of {self.folder.parent} cannot be replayed, {missing}; these can: {listed}")
        return load_trajectories(self._step(step))

    def checkpoints(self) -> list[int]:
        """Policy versions that a complete checkpoint holds, 0 for the initial one."""
        folder = Path(self.config.job.dump_folder) / self.config.checkpoint.folder
        return [0, *(number for number, path in _numbered(folder, r"step-(\d+)") if (path / ".metadata").exists())]

    def checkpoint(self, version: int) -> Path:
        """The directory that holds policy version `version`."""
        settings = self.config.checkpoint
        if version == 0:
            return Path(settings.initial_load_path or self.config.model.hf_assets_path)
        return Path(self.config.job.dump_folder) / settings.folder / f"step-{version}"

    def differences(self, version: int) -> list[str]:
        """Tensors and other entries of the checkpoint that are not what they were when the run wrote (or read) it.

        Raises:
            ValueError: no digests were recorded for it, or its index cannot be read.
        """
        return differences(self._checkpoint(version), self.checkpoint(version))

    def _is_saved(self, version: int) -> bool:
        settings, steps = self.config.checkpoint, self.config.training.steps
        return version in (0, self.first_step, steps) or version % settings.interval == 0

    def _step(self, step: int) -> Path:
        return self.folder / f"step-{step}.safetensors"

    def _checkpoint(self, version: int) -> Path:
        return self.folder / f"checkpoint-{version}.json"


def save_trajectories(trajectories: list[Trajectory], path: Path) -> None:
    """Writes all of the trajectories but their text: ids, fp32 log-probs as they are, seeds, versions, prompt names."""
    requests = [t.request for t in trajectories]
    tensors = {
        "prompt_ids": torch.tensor([i for r in requests for i in r.prompt_ids], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in requests], dtype=torch.int32),
        "completion_ids": torch.tensor([i for t in trajectories for i in t.completion_ids], dtype=torch.int32),
        "completion_lengths": torch.tensor([len(t.completion_ids) for t in trajectories], dtype=torch.int32),
        "logprobs": torch.cat([t.logprobs for t in trajectories]),
        "seeds": torch.tensor([r.seed for r in requests], dtype=torch.int64),
        "samples": torch.tensor([r.sample for r in requests], dtype=torch.int32),
        "policy_versions": torch.tensor([t.policy_version for t in trajectories], dtype=torch.int32),
    }
    words = {"uids": [r.uid for r in requests], "finish_reasons": [t.finish_reason for t in trajectories]}
    versions = sorted({t.policy_version for t in trajectories})
    metadata = {"words": json.dumps(words), "policy_versions": json.dumps(versions)}
    draft = path.with_suffix(".tmp")
    try:
        save_file(tensors, draft, metadata)
    except SafetensorError as error:  # A full disk, say.
        raise OSError(f"{draft} cannot be written: {error}") from error
    draft.rename(path)


def load_trajectories(path: Path) -> list[Trajectory]:
    """What `save_trajectories` wrote; the text is empty."""
    with safe_open(path, "pt") as file:
        words = json.loads(file.metadata()["words"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    lengths = tensors["completion_lengths"].tolist()
    return [
        Trajectory(
            Request(uid, sample, prompt.tolist(), seed), completion.tolist(), logprobs, version, finish_reason, ""
        )
        for uid, sample, prompt, seed, completion, logprobs, version, finish_reason in zip(
            words["uids"],
            tensors["samples"].tolist(),
            tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist()),
            tensors["seeds"].tolist(),
            tensors["completion_ids"].split(lengths),
            tensors["logprobs"].split(lengths),
            tensors["policy_versions"].tolist(),
            words["finish_reasons"],
            strict=True,
        )
    ]


def versions_of(path: Path) -> set[int] | None:
    """Policy versions that the tokens in a file of `save_trajectories` were sampled with; None: it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return set(json.loads(file.metadata()["policy_versions"]))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def differences(record: Path, checkpoint: Path) -> list[str]:
    """Entries of `checkpoint` whose bytes are not those that `record`, a `checkpoint-V.json`, has digests of.

    Raises:
        ValueError: there is no record, or the checkpoint's index cannot be read.
    """
    if not record.exists():
        raise ValueError(f"{record} is missing: no digests of {checkpoint} were recorded")
    recorded = json.loads(record.read_text())
    try:
        found = checkpoint_digests(checkpoint)
    except Exception as error:
        raise ValueError(f"the checkpoint {checkpoint} cannot be read: {error}") from error
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each entry's bytes in a checkpoint, by name; a sharded tensor has one for each shard.

    Args:
        folder: written by torch.distributed.checkpoint (every byte of its data files belongs to one entry), or a
            directory of safetensors files.
    """
    entries = _dcp_entries(folder) if (folder / ".metadata").exists() else _safetensors_entries(folder)
    digests = {}
    for name, path, offset, length in entries:
        with open(path, "rb") as file:
            file.seek(offset)
            digests[name] = hashlib.sha256(file.read(length)).hexdigest()
    return digests


def _dcp_entries(folder: Path) -> Iterator[tuple[str, Path, int, int]]:
    index = folder / ".metadata"
    yield "the index (.metadata)", index, 0, index.stat().st_size
    for key, where in read_metadata(folder).storage_data.items():
        shard = f" at {list(key.offset)}" if key.offset and any(key.offset) else ""
        yield key.fqn + shard, folder / where.relative_path, where.offset, where.length


def _safetensors_entries(folder: Path) -> Iterator[tuple[str, Path, int, int]]:
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            yield f"the header of {path.name}", path, 0, 8 + header
            for name, entry in json.loads(file.read(header)).items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    yield name, path, 8 + header + start, end - start


def _read_or_none(folder: Path) -> dict[str, str] | None:
    try:
        return checkpoint_digests(folder)
    except FileNotFoundError:
        return None


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Entries of the folder whose whole name matches, with the number in it, sorted by that."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(m[1]), path) for path in entries if (m := re.fullmatch(pattern, path.name)))
