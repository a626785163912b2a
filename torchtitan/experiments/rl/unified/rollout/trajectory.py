# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a generator hands to a trainer: tokens as they were sampled, never text that would be tokenised again."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.experiments.rl.unified.job_config import Sampling


@dataclass(frozen=True)
class Request:
    """One completion to sample.

    Attributes:
        uid: names the prompt and its place in the run, e.g. "epoch 0 row 17".
        sample: index of the completion in its prompt's group.
        prompt_ids: token ids of the prompt.
        seed: of this completion's sampling.
        row: of the prompt in its dataset.
        sampling: its settings; None: the job's `[sampling]`.
    """

    uid: str
    sample: int
    prompt_ids: list[int]
    seed: int
    row: int = 0
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Trajectory:
    """One sampled completion.

    Attributes:
        request: what was asked for.
        completion_ids: the sampled token ids, a sampled EOS and the tokens of a stop string included; never empty.
        logprobs: fp32 (tokens,), the generator's log-prob of each of them, of the distribution sampled from.
        policy_version: of the weights that sampled them.
        finish_reason: "stop" (EOS or a stop string) or "length" (truncated).
        text: the completion, decoded once for rewards and reports, without EOS and stop string.
    """

    request: Request
    completion_ids: list[int]
    logprobs: torch.Tensor
    policy_version: int
    finish_reason: str
    text: str

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able and exact: an fp32 number is one of JSON's."""
        return {**dataclasses.asdict(self), "logprobs": self.logprobs.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Trajectory":
        """What `to_dict` was called on."""
        logprobs = torch.tensor(values["logprobs"], dtype=torch.float32)
        return cls(**{**values, "request": Request(**values["request"]), "logprobs": logprobs})


def completion_seed(run_seed: int, uid: str, sample: int) -> int:
    """The 63-bit sampling seed of one completion, a hash of the run's seed, the prompt and the sample's index."""
    digest = hashlib.blake2b(f"{run_seed}/{uid}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
