# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The claim of this experiment, checked: each sampled token's log-prob is the same bits in generator and trainer."""

import torch
from torchtitan.experiments.rl.unified.messages import ParityReport


def compare(generator_T: torch.Tensor, trainer_T: torch.Tensor, where) -> ParityReport:
    """Compares log-probs of the same tokens under the same weights, by their bits.

    Args:
        generator_T, trainer_T: fp32 (tokens,).
        where: called with a token's index, says in words which token it is.
    """
    assert generator_T.dtype == trainer_T.dtype == torch.float32 and generator_T.shape == trainer_T.shape
    # As integers: NaN equals the same NaN, and 0.0 does not equal -0.0.
    differs_T = generator_T.view(torch.int32) != trainer_T.view(torch.int32)
    mismatched = int(differs_T.sum())
    if not mismatched:
        return ParityReport(tokens_compared=len(generator_T))
    first = int(differs_T.nonzero()[0])
    difference = (generator_T - trainer_T).abs().nan_to_num(nan=torch.inf).max()
    return ParityReport(
        len(generator_T),
        mismatched,
        float(difference),
        f"{where(first)}: generator {generator_T[first].item()!r}, trainer {trainer_T[first].item()!r}",
    )
