# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Sums over microbatches and ranks, and the means that are reported."""

from torchtitan.experiments.rl.unified.messages import TokenStats


def test_sums_add_up_and_become_means():
    one = TokenStats(6, 2, 1, 3, 1.5, 0.25)
    total = one + TokenStats(2, 2, 0, 0, 0.5, 0.25, left_out_tokens=1) + TokenStats()
    assert total.means() == {
        "kl_generator_trainer": 0.5 / 8,
        "clip_fraction": 3 / 8,
        "entropy": 2 / 8,
        "stale_tokens": 4.0,
        "left_out_tokens": 1.0,
        "tis_truncated_fraction": 1 / 4,
    }


def test_the_reference_counts_once_some_rank_has_one():
    # A rank that shares its tokens with another reports nothing.
    total = TokenStats() + TokenStats(tokens=4, kl_reference=1.0) + TokenStats(tokens=4, kl_reference=2.0)
    assert total.means()["kl_reference"] == 3 / 8


def test_what_has_no_divergence_is_not_in_its_mean():
    assert TokenStats(tokens=6, kl_generator_trainer=1.0, unknown_kl_tokens=2).means()["kl_generator_trainer"] == 1 / 4


def test_nothing_is_not_a_division_by_zero():
    assert set(TokenStats().means().values()) == {0.0}
