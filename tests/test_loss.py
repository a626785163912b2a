# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Policy losses against plain loops in float64, and at ratios where a careless formula gives NaN."""

import math

import pytest
import torch
from torchtitan.experiments.rl.unified.algorithms.losses import LOSSES, policy_loss
from torchtitan.experiments.rl.unified.algorithms.losses.base import kl_k3, MAX_LOG_RATIO, tis_weight
from torchtitan.experiments.rl.unified.config.sections import PolicyLoss

CLIPS = [
    *((name, *clip) for name in ("grpo", "dr_grpo") for clip in ((0.2, 0.2), (0.0, 0.0), (0.4, 0.4))),
    *((name, *clip) for name in ("dapo", "reinforce") for clip in ((0.2, 0.2), (0.2, 0.28), (0.0, 1.0))),
]


def reference_loss(name: str, logprob: float, behavior: float, advantage: float, low: float, high: float) -> float:
    if name == "reinforce":
        return -advantage * logprob
    ratio = math.exp(logprob - behavior)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def reference_gradient(name: str, logprob: float, behavior: float, advantage: float, low: float, high: float) -> float:
    if name == "reinforce":
        return -advantage
    ratio = math.exp(logprob - behavior)
    stopped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    return 0.0 if stopped else -ratio * advantage


def tokens(count: int = 500) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs_T = -torch.rand(count, generator=generator, dtype=torch.float64) * 5
    behavior_T = logprobs_T + 0.4 * torch.randn(count, generator=generator, dtype=torch.float64)
    advantages_T = torch.randn(count, generator=generator, dtype=torch.float64)
    behavior_T[:50] = logprobs_T[:50]
    advantages_T[40:60] = 0.0
    return logprobs_T.requires_grad_(), behavior_T, advantages_T


@pytest.mark.parametrize("name, low, high", CLIPS)
def test_loss_and_gradient_equal_the_definition(name, low, high):
    logprobs_T, behavior_T, advantages_T = tokens()
    loss_T, clipped_T = LOSSES[name](low, high)(logprobs_T, behavior_T, advantages_T)
    rows = list(zip(logprobs_T.tolist(), behavior_T.tolist(), advantages_T.tolist(), strict=True))
    expected_T = torch.tensor([reference_loss(name, *row, low, high) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(loss_T, expected_T, rtol=1e-13, atol=1e-13)

    loss_T.sum().backward()
    gradient_T = torch.tensor([reference_gradient(name, *row, low, high) for row in rows], dtype=torch.float64)
    # With clip_low = 0 an on-policy token sits on the clip's edge, where either gradient is one.
    inside_T = torch.ones(len(rows), dtype=torch.bool) if low else behavior_T != logprobs_T
    torch.testing.assert_close(logprobs_T.grad[inside_T], gradient_T[inside_T], rtol=1e-12, atol=1e-12)

    assert torch.equal(clipped_T, (gradient_T == 0) & (advantages_T != 0))
    assert name == "reinforce" or clipped_T.any()


def test_on_policy_every_gradient_is_that_of_reinforce():
    logprobs_T, _, advantages_T = tokens()
    gradients = {}
    for name in LOSSES:
        loss_T, clipped_T = LOSSES[name]()(logprobs_T, logprobs_T.detach(), advantages_T)
        (gradients[name],) = torch.autograd.grad(loss_T.sum(), logprobs_T)
        assert not clipped_T.any()
    assert all(torch.equal(gradient_T, -advantages_T) for gradient_T in gradients.values())


def test_dapo_clips_high_later_than_grpo():
    logprobs_T, behavior_T = torch.tensor([0.25]).log(), torch.tensor([0.2]).log()
    advantages_T = torch.ones(1)
    _, grpo_T = LOSSES["grpo"](0.2, 0.2)(logprobs_T, behavior_T, advantages_T)
    _, dapo_T = LOSSES["dapo"](0.2, 0.28)(logprobs_T, behavior_T, advantages_T)
    assert grpo_T.item() and not dapo_T.item()


def test_normalization_tells_dr_grpo_from_grpo():
    assert {name: loss.normalization for name, loss in LOSSES.items()} == {
        "grpo": "tokens",
        "dr_grpo": "constant",
        "dapo": "tokens",
        "reinforce": "tokens",
    }


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("difference", [-1e4, -200.0, -88.8, 88.8, 200.0, 1e4])
@pytest.mark.parametrize("advantage", [-3.0, 0.0, 3.0])
def test_extreme_ratios_stay_finite(name, difference, advantage):
    logprobs_T = torch.tensor([-1e4 if difference < 0 else -1e-3], requires_grad=True)
    behavior_T = logprobs_T.detach() - difference
    loss_T, _ = LOSSES[name]()(logprobs_T, behavior_T, torch.tensor([advantage]))
    loss_T.sum().backward()
    assert loss_T.isfinite().all() and logprobs_T.grad.isfinite().all()


def test_kl_k3_equals_the_definition_and_is_never_negative():
    logprobs_T, reference_T, _ = tokens()
    kl_T = kl_k3(logprobs_T, reference_T)
    rows = zip(logprobs_T.tolist(), reference_T.tolist(), strict=True)
    expected = [math.exp(reference - logprob) - 1 - (reference - logprob) for logprob, reference in rows]
    torch.testing.assert_close(kl_T, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-13)
    assert (kl_T >= 0).all()
    (gradient_T,) = torch.autograd.grad(kl_T.sum(), logprobs_T)
    expected_T = 1 - (reference_T - logprobs_T.detach()).exp()
    torch.testing.assert_close(gradient_T, expected_T, rtol=1e-12, atol=1e-12)


def test_kl_k3_estimates_the_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    policy_V = torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(0)
    reference_V = torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(0)
    estimate = (policy_V.exp() * kl_k3(policy_V, reference_V)).sum()
    torch.testing.assert_close(estimate, (policy_V.exp() * (policy_V - reference_V)).sum())


def test_kl_k3_pulls_back_a_token_that_the_reference_finds_impossible():
    logprobs_T = torch.tensor([-1.0], requires_grad=True)
    kl_k3(logprobs_T, torch.tensor([-81.0])).sum().backward()
    assert logprobs_T.grad.item() == 1.0


@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_kl_k3_stays_finite(difference):
    logprobs_T = torch.tensor([-1.0], requires_grad=True)
    kl_T = kl_k3(logprobs_T, torch.tensor([-1.0 + difference]))
    kl_T.sum().backward()
    assert kl_T.isfinite().all() and logprobs_T.grad.isfinite().all()


def test_tis_weight_is_truncated_and_without_gradient():
    logprobs_T, behavior_T, _ = tokens()
    weight_T = tis_weight(logprobs_T, behavior_T, 1.5)
    rows = zip(logprobs_T.tolist(), behavior_T.tolist(), strict=True)
    expected = [min(math.exp(logprob - behavior), 1.5) for logprob, behavior in rows]
    torch.testing.assert_close(weight_T, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0.0)
    assert (weight_T == 1.5).any() and not weight_T.requires_grad
    assert tis_weight(torch.tensor([0.0]), torch.tensor([-1e4]), 2.0).item() == 2.0
    assert tis_weight(torch.tensor([-1e4]), torch.tensor([0.0]), 2.0).item() == pytest.approx(math.exp(-MAX_LOG_RATIO))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "ppo"}, "'ppo' does not exist; choose one of: grpo, dr_grpo, dapo, reinforce"),
        ({"clip_high": 0.28}, 'make them equal or choose "dapo"'),
        ({"name": "dr_grpo", "clip_high": 0.28}, 'make them equal or choose "dapo"'),
        ({"name": "dapo", "clip_low": -0.1}, "clip_low must be between 0 and 1"),
        ({"name": "dapo", "clip_high": float("nan")}, "clip_high not below 0"),
        ({"kl_weight": -0.1}, "kl_weight = -0.1 must not be below 0"),
        ({"tis_cap": float("nan")}, "tis_cap = nan must be above 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(PolicyLoss(**settings))


def test_a_good_setting_gives_the_registered_loss_with_its_clip_range():
    loss = policy_loss(PolicyLoss(name="dapo", clip_high=0.28))
    assert type(loss) is LOSSES["dapo"] and (loss.clip_low, loss.clip_high) == (0.2, 0.28)
