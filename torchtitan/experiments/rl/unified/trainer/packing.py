# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Trajectories packed end to end into microbatches, without padding."""

from dataclasses import dataclass, replace

import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.experiments.rl.unified.messages import Trajectory


@dataclass(frozen=True)
class Microbatch:
    r"""Sequences laid end to end; every tensor but cu_seqlens is (1, tokens).

    One sequence with prompt a b and completion x y EOS; its last token predicts nothing and is left out:

        tokens              a   b   x   y
        positions           0   1   2   3
        labels              -   x   y   EOS      (-: IGNORE_INDEX)
        generator_logprobs  0   lx  ly  lEOS
        advantages          0   A   A   A
        policy_versions     v   v   v   v

    Attributes:
        tokens: int64 token ids.
        positions: int64 place of each token in its sequence.
        cu_seqlens: int32 (sequences + 1,), where each sequence starts, and the end.
        labels: int64 sampled token that follows, IGNORE_INDEX where it was not sampled.
        generator_logprobs: fp32 log-prob the generator sampled the label with.
        advantages: fp32 advantage of the label's trajectory.
        policy_versions: int64 version of the weights that sampled the label.
        trajectories: indices of the sequences in the list they were packed from.
        reference_logprobs: fp32 (sampled labels,), their log-probs under the reference policy; None without one.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    labels: torch.Tensor
    generator_logprobs: torch.Tensor
    advantages: torch.Tensor
    policy_versions: torch.Tensor
    trajectories: list[int]
    reference_logprobs: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Microbatch":
        """The same with its tensors on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)

    def sampled(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of `values` (1, tokens, ...) whose label was sampled."""
        return values[0][self.labels[0] != IGNORE_INDEX]


def assign_microbatches(trajectories: list[Trajectory], ranks: int, token_budget: int) -> list[list[list[int]]]:
    """Which trajectories go into which microbatch of which data-parallel rank.

    Every trajectory is trained on once, every rank gets as many trajectories and as many microbatches as the others
    (a backward pass is a collective), and no microbatch exceeds the budget unless one sequence alone does.

    Args:
        trajectories: of the whole step; `ranks` divides their number.
        ranks: data-parallel degree.
        token_budget: most tokens of a microbatch.

    Returns:
        Indices into `trajectories`, as [rank][microbatch][sequence].
    """
    assert len(trajectories) % ranks == 0, f"{len(trajectories)} trajectories do not divide among {ranks} ranks"
    shares = [_fill(trajectories, range(rank, len(trajectories), ranks), token_budget) for rank in range(ranks)]
    count = max(len(microbatches) for microbatches in shares)
    for microbatches in shares:
        while len(microbatches) < count:
            largest = max(microbatches, key=len)
            microbatches.append(largest[len(largest) // 2 :])
            del largest[len(largest) // 2 :]
    return shares


def pack(trajectories: list[Trajectory], advantages: torch.Tensor, indices: list[int]) -> Microbatch:
    """Lays the trajectories at `indices` end to end; `advantages` is fp32 (trajectories,) of the whole step."""
    return _pack_one([trajectories[i] for i in indices], advantages[indices], indices)


def _fill(trajectories: list[Trajectory], indices: range, token_budget: int) -> list[list[int]]:
    microbatches: list[list[int]] = []
    free = 0
    for index in indices:
        length = _length(trajectories[index])
        if not microbatches or length > free:
            microbatches.append([])
            free = token_budget
        microbatches[-1].append(index)
        free -= length
    return microbatches


def _length(trajectory: Trajectory) -> int:
    return len(trajectory.request.prompt_ids) + len(trajectory.completion_ids) - 1


def _pack_one(trajectories: list[Trajectory], advantages: torch.Tensor, indices: list[int]) -> Microbatch:
    lengths = torch.tensor([_length(t) for t in trajectories])
    tokens, labels, logprobs = [], [], []
    for trajectory in trajectories:
        prompt, completion = trajectory.request.prompt_ids, trajectory.completion_ids
        unsampled = len(prompt) - 1
        tokens += prompt + completion[:-1]
        labels += [IGNORE_INDEX] * unsampled + completion
        logprobs += [torch.zeros(unsampled), trajectory.logprobs]
    labels_T = torch.tensor(labels)
    return Microbatch(
        tokens=torch.tensor(tokens)[None],
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32),
        labels=labels_T[None],
        generator_logprobs=torch.cat(logprobs)[None],
        advantages=(advantages.repeat_interleave(lengths) * (labels_T != IGNORE_INDEX))[None],
        policy_versions=torch.tensor([t.policy_version for t in trajectories]).repeat_interleave(lengths)[None],
        trajectories=indices,
    )
