# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.experiments.rl.unified.rollout.packing import pack, plan
from torchtitan.experiments.rl.unified.rollout.trajectory import completion_seed, Request, Trajectory

EOS = 9


def trajectory(prompt: list[int], completion: list[int], logprobs: list[float], reason: str = "stop", version: int = 0):
    return Trajectory(Request("p", 0, prompt, 0), completion, torch.tensor(logprobs), version, reason, "")


def of_length(tokens: int) -> Trajectory:
    return trajectory([1], [2] * tokens, [-1.0] * tokens)


def test_layout_of_a_pack():
    finished = trajectory([1, 2], [3, 4, EOS], [-0.1, -0.2, -0.3])
    truncated = trajectory([5], [6, 7], [-0.4, -0.5], reason="length", version=3)
    packed = pack([finished, truncated], torch.tensor([2.0, -1.0]), [0, 1])

    # sequence            |-- finished --|  |- truncated -|
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert packed.labels.tolist() == [[IGNORE_INDEX, 3, 4, EOS, 6, 7]]
    assert packed.advantages.tolist() == [[0.0, 2.0, 2.0, 2.0, -1.0, -1.0]]
    assert packed.policy_versions.tolist() == [[0, 0, 0, 0, 3, 3]]
    assert packed.sampled(packed.policy_versions).tolist() == [0, 0, 0, 3, 3]
    expected = torch.tensor([[0.0, -0.1, -0.2, -0.3, -0.4, -0.5]])
    assert torch.equal(packed.generator_logprobs, expected)
    assert packed.cu_seqlens.tolist() == [0, 4, 6] and packed.cu_seqlens.dtype == torch.int32
    assert packed.trajectories == [0, 1]


def test_a_completion_of_one_token_after_a_prompt_of_one():
    packed = pack([trajectory([1], [EOS], [-0.5])], torch.tensor([1.0]), [0])
    assert packed.tokens.tolist() == [[1]] and packed.labels.tolist() == [[EOS]]


def test_every_trajectory_is_planned_once_and_within_budget():
    trajectories = [of_length(n) for n in (3, 50, 7, 7, 90, 2, 30, 30)]
    shares = plan(trajectories, ranks=2, token_budget=64)
    assert sorted(i for rank in shares for microbatch in rank for i in microbatch) == list(range(8))
    assert {len(rank) for rank in shares} == {len(shares[0])}, "a backward pass is a collective: as many on each rank"
    assert {sum(len(m) for m in rank) for rank in shares} == {4}
    for rank in shares:
        for microbatch in rank:
            tokens = sum(len(trajectories[i].completion_ids) for i in microbatch)
            assert tokens <= 64 or len(microbatch) == 1


def test_a_rank_with_short_sequences_splits_to_keep_up():
    # Rank 0 gets the long ones (even indices), which need a microbatch each.
    trajectories = [of_length(60 if i % 2 == 0 else 2) for i in range(8)]
    long, short = plan(trajectories, ranks=2, token_budget=64)
    assert long == [[0], [2], [4], [6]]
    assert sorted(short) == [[1], [3], [5], [7]]


def test_seeds_differ_by_run_prompt_and_sample():
    seeds = {completion_seed(run, uid, sample) for run in (0, 1) for uid in ("a", "b") for sample in range(50)}
    assert len(seeds) == 200
    assert completion_seed(1, "a", 2) == completion_seed(1, "a", 2)
    assert all(0 <= seed < 2**63 for seed in seeds)
