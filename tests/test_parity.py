# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import math

import torch
from torchtitan.experiments.rl.unified.messages import ParityReport
from torchtitan.experiments.rl.unified.trainer.parity import compare


def name(token: int) -> str:
    return f"token {token}"


def test_equal_bits_match():
    x = torch.randn(1000)
    assert compare(x, x.clone(), name) == ParityReport(tokens_compared=1000)


def test_one_last_bit_is_a_mismatch_and_is_named_with_both_values():
    x = torch.full((5,), -1.5)
    y = x.clone()
    y[3] = torch.nextafter(y[3], torch.tensor(0.0))
    report = compare(x, y, name)
    assert (report.tokens_compared, report.mismatched_tokens) == (5, 1)
    assert report.first == f"token 3: generator -1.5, trainer {y[3].item()!r}"
    assert report.max_difference == abs(-1.5 - y[3].item())


def test_nan_and_the_sign_of_zero():
    nan = torch.tensor([math.nan])
    assert compare(nan, nan.clone(), name).mismatched_tokens == 0
    assert compare(torch.tensor([0.0]), torch.tensor([-0.0]), name).mismatched_tokens == 1
    assert compare(nan, torch.tensor([-1.0]), name).max_difference == math.inf
    assert compare(torch.tensor([-math.inf]), torch.tensor([-1.0]), name).max_difference == math.inf


def test_reports_add_up_and_keep_the_first_mismatch():
    a, b = ParityReport(3, 0, 0.0, ""), ParityReport(4, 2, 0.5, "x")
    assert a + b + ParityReport(1, 1, 0.1, "y") == ParityReport(8, 3, 0.5, "x")
