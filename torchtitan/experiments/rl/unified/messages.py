# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What travels between the processes of a job: tokens as they were sampled, weights, what came of a step."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.experiments.rl.unified.config.sections import Sampling


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


@dataclass(frozen=True)
class RewardResult:
    """A completion's reward.

    Attributes:
        total: sum of weight times part.
        parts: each reward by its name, before its weight.
    """

    total: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Scored:
    """Rewards of a step's trajectories, in their order.

    Attributes:
        rewards: total and parts of each.
        advantages: fp32 (trajectories,).
        asked: (prompt, reference answer) of each.
        without_signal: share of the groups whose rewards are all equal.
        timeouts: samples that got 0 because a reward was not done with them in time; None: no reward does that.
    """

    rewards: list[RewardResult]
    advantages: torch.Tensor
    asked: list[tuple[str, str]]
    without_signal: float = 0.0
    timeouts: int | None = None


@dataclass(frozen=True)
class ParityReport:
    """Outcome of one comparison; reports add up.

    Attributes:
        tokens_compared: sampled tokens looked at, each under the weights that sampled it.
        mismatched_tokens: those whose fp32 log-probs differ in any bit.
        max_difference: largest absolute difference, nats; NaN counts as infinite.
        first: description of the first mismatch, empty without one.
        tokens_unverifiable: not looked at, because the weights that sampled them are gone: batches that were sampled
            ahead of the checkpoint which the run went on from.
    """

    tokens_compared: int = 0
    mismatched_tokens: int = 0
    max_difference: float = 0.0
    first: str = ""
    tokens_unverifiable: int = 0

    def __add__(self, other: "ParityReport") -> "ParityReport":
        return ParityReport(
            self.tokens_compared + other.tokens_compared,
            self.mismatched_tokens + other.mismatched_tokens,
            max(self.max_difference, other.max_difference),
            self.first or other.first,
            self.tokens_unverifiable + other.tokens_unverifiable,
        )


@dataclass(frozen=True)
class TokenStats:
    """Sums over sampled tokens; in nats where not a count.

    Attributes:
        tokens: sampled tokens.
        stale_tokens: those of a policy version older than the trainer's.
        truncated_weights: stale tokens whose importance weight was cut to `[policy_loss] tis_cap`.
        clipped_tokens: whose gradient the loss's clip range stopped.
        entropy: of the distributions that the tokens were sampled from, under the trainer's policy.
        kl_generator_trainer: k3 estimates of KL(generator, trainer): exactly 0 where all log-probs are equal. Stale
            tokens of a filtered distribution (top_k, top_p) are looked at before the filter, on both sides.
        kl_reference: k3 estimates of KL(trainer, reference policy), before the filter; None without a reference.
        left_out_tokens: stale tokens that the current policy's filter gives no probability: they have no log-prob to
            train on, and are in neither the loss nor its divisor.
        unknown_kl_tokens: that `kl_generator_trainer` lacks: stale, filtered, and not computed again.
    """

    tokens: int = 0
    stale_tokens: int = 0
    truncated_weights: int = 0
    clipped_tokens: int = 0
    entropy: float = 0.0
    kl_generator_trainer: float = 0.0
    kl_reference: float | None = None
    left_out_tokens: int = 0
    unknown_kl_tokens: int = 0

    def __add__(self, other: "TokenStats") -> "TokenStats":
        values = {name: _add(value, getattr(other, name)) for name, value in vars(self).items()}
        return TokenStats(**values)

    def means(self) -> dict[str, float]:
        """Metrics by name: means over the tokens, and the number of stale ones; `kl_reference` only if there is one."""
        tokens = max(self.tokens, 1)
        means = {
            "kl_generator_trainer": self.kl_generator_trainer / max(self.tokens - self.unknown_kl_tokens, 1),
            "clip_fraction": self.clipped_tokens / tokens,
            "entropy": self.entropy / tokens,
            "stale_tokens": float(self.stale_tokens),
            "left_out_tokens": float(self.left_out_tokens),
            "tis_truncated_fraction": self.truncated_weights / max(self.stale_tokens, 1),
        }
        if self.kl_reference is not None:
            means["kl_reference"] = self.kl_reference / tokens
        return means


def _add(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else one + other


@dataclass(frozen=True)
class StepResult:
    """What one rank knows after a step: its own tokens' parity, and the global loss figures.

    Attributes:
        step: optimizer steps taken, the version of the weights now.
        loss: global loss sum over the step's token count.
        grad_norm: before clipping.
        lr: the learning rate the step was taken with.
        parity: of this rank's tokens; empty on all but the first of the ranks that share them (tensor parallel).
        stats: likewise.
        checkpoint_due: `save` is to be called before the next step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    parity: ParityReport
    stats: TokenStats
    checkpoint_due: bool


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of an update: its place in the transfer, in bytes from the start, and its checksum."""

    spec: TensorSpec
    offset: int
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + self.spec.nbytes


@dataclass(frozen=True)
class WeightUpdate:
    """What a generator needs to fetch one version of the weights.

    Attributes:
        version: of the policy: optimizer steps taken.
        location: path of the bytes on the sender's host.
        entries: the tensors, named as in the TrainSpec model's state dict.
        handle: what else the transport needs to reach the bytes from another host.
        lasting: the bytes stay until the version after the next is sent: an engine may work on them where they are.
        changed: share of the weights (of a sample) that differ from the version sent before; None for the first.
    """

    version: int
    location: str
    entries: list[TensorEntry]
    handle: Any = None
    lasting: bool = False
    changed: float | None = None
