# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import math

import pytest
import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.experiments.rl.unified.algorithms.losses import policy_loss
from torchtitan.experiments.rl.unified.config.sections import PolicyLoss
from torchtitan.experiments.rl.unified.messages import completion_seed, Request, Trajectory
from torchtitan.experiments.rl.unified.trainer.logprobs import sampling_logprobs
from torchtitan.experiments.rl.unified.trainer.packing import assign_microbatches, pack

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
    shares = assign_microbatches(trajectories, ranks=2, token_budget=64)
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
    long, short = assign_microbatches(trajectories, ranks=2, token_budget=64)
    assert long == [[0], [2], [4], [6]]
    assert sorted(short) == [[1], [3], [5], [7]]


def test_seeds_differ_by_run_prompt_and_sample():
    seeds = {completion_seed(run, uid, sample) for run in (0, 1) for uid in ("a", "b") for sample in range(50)}
    assert len(seeds) == 200
    assert completion_seed(1, "a", 2) == completion_seed(1, "a", 2)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_pack_from_sampled_tokens_to_its_loss_by_hand():
    """Three sequences of a vocabulary of four tokens (3 is EOS), laid end to end.

        sequence        |------- finished ------|  |--- truncated --|  |- empty -|
        sampled          prompt   completion        prompt completion   prompt EOS
        tokens           0    1    2    0           2    1    0         1
        positions        0    1    2    3           0    1    2         0
        labels           -    2    0    3           -    0    2         3         (-: not sampled)
        trainer p        -   1/2  1/4  1/4          -   1/2  1/4       1/4        of the label
        generator p      -   1/4  1/4  1/2          -   1/2  1/4       1/4
        ratio            -    2    1   1/2          -    1    1         1
        advantage        -    3    3    3           -   -1   -1        -2
        clipped ratio    -   1.2   1   0.8          -    1    1         1
        loss             -  -3.6  -3  -1.5          -    1    1         2         -min(ratio A, clipped ratio A)

    The last token of each sequence (EOS, or the one it was cut off at) predicts nothing and is no input.
    """
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    finished = trajectory([0, 1], [2, 0, 3], [quarter, quarter, half])
    truncated = trajectory([2, 1], [0, 2], [half, quarter], reason="length")
    empty = trajectory([1], [3], [quarter])
    packed = pack([finished, truncated, empty], torch.tensor([3.0, -1.0, -2.0]), [0, 1, 2])

    assert packed.tokens.tolist() == [[0, 1, 2, 0, 2, 1, 0, 1]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert packed.cu_seqlens.tolist() == [0, 4, 7, 8]
    none = IGNORE_INDEX
    assert packed.labels.tolist() == [[none, 2, 0, 3, none, 0, 2, 3]]

    # After inputs 1 and 5 one token has p = 1/2 and the others 1/6; after all others each has 1/4.
    logits = torch.zeros(8, 4)
    logits[1, 2] = logits[5, 0] = math.log(3)
    sampled_T = packed.labels[0] != IGNORE_INDEX
    logprobs_N = sampling_logprobs(logits[sampled_T], packed.labels[0][sampled_T], temperature=1.0)
    expected = torch.tensor([half, quarter, quarter, half, quarter, quarter])
    torch.testing.assert_close(logprobs_N, expected, rtol=0, atol=1e-6)

    generator_N, advantages_N = packed.generator_logprobs[0][sampled_T], packed.advantages[0][sampled_T]
    assert torch.equal(generator_N, torch.tensor([quarter, quarter, half, half, quarter, quarter]))
    assert advantages_N.tolist() == [3, 3, 3, -1, -1, -2]
    loss_N, _ = policy_loss(PolicyLoss(name="grpo"))(logprobs_N, generator_N, advantages_N)
    torch.testing.assert_close(loss_N, torch.tensor([-3.6, -3.0, -1.5, 1.0, 1.0, 2.0]), rtol=0, atol=1e-5)
    assert float(loss_N.sum() / len(loss_N)) == pytest.approx(-4.1 / 6, abs=1e-6)
