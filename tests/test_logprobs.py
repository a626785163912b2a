# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import math

import pytest
import torch
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.trainer.logprobs import sampling_entropy, sampling_logits, sampling_logprobs


def test_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    got = sampling_logprobs(logits, torch.tensor([1, 1]), temperature=1.0)
    assert got.tolist() == pytest.approx([math.log(0.75), math.log(0.2)], rel=1e-6)
    # temperature 0.5 squares the odds
    got = sampling_logprobs(logits, torch.tensor([1, 1]), temperature=0.5)
    assert got.tolist() == pytest.approx([math.log(0.9), math.log(1 / 17)], rel=1e-6)


def test_top_k_and_top_p_leave_the_distribution_that_is_sampled_from():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    first = torch.tensor([0])
    assert sampling_logprobs(logits, first, 1.0, top_k=2).item() == pytest.approx(math.log(0.5 / 0.8), rel=1e-5)
    assert sampling_logprobs(logits, first, 1.0, top_p=0.9).item() == pytest.approx(math.log(0.5 / 0.95), rel=1e-5)


def test_greedy_reports_the_unscaled_distribution():
    logits = torch.randn(3, 10)
    tokens = logits.argmax(-1)
    assert torch.equal(sampling_logprobs(logits, tokens, 0.0), sampling_logprobs(logits, tokens, 1.0))


def test_the_gradient_stays_within_the_filter():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().requires_grad_()
    sampling_logprobs(logits, torch.tensor([0]), 1.0, top_k=2).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.8}])
def test_entropy_is_that_of_the_distribution_sampled_from_in_chunks_too(settings, monkeypatch):
    logits = 3 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    expected = []
    for row in sampling_logits(logits, 0.7, **settings).double().softmax(-1).tolist():
        expected.append(-math.fsum(p * math.log(p) for p in row if p))
    whole = sampling_entropy(logits.requires_grad_(), 0.7, **settings)
    assert whole.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6) and not whole.requires_grad
    monkeypatch.setattr(this_device(), "logits_at_once", 16 * 7)
    assert torch.equal(sampling_entropy(logits, 0.7, **settings), whole)
