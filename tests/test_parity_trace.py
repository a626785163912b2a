# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a trace of a model's operations records, by token."""

import sys
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import parity_trace  # noqa: E402


class Heads(torch.nn.Module):
    """Three heads of four features."""

    def __init__(self) -> None:
        super().__init__()
        self.silu, self.norm = torch.nn.SiLU(), torch.nn.RMSNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.silu(x).unflatten(-1, (3, 4)))


@pytest.mark.parametrize("batch", [(), (1,)])
def test_a_token_alone_is_recorded_as_among_others(batch):
    """Proves that what is recorded of a token does not depend on how many are computed with it."""
    tokens = torch.randn(5, 12)
    recorded = []
    for rows in ([0, 1, 2, 3, 4], [0, 1, 2], [3, 4], [0], [1], [2], [3], [4]):
        model = Heads()
        recorder = parity_trace.Recorder(model)
        recorder.rows = [(0, row) for row in rows]
        with torch.no_grad(), batch_invariant_mode(), recorder:
            model(tokens[rows].reshape(*batch, len(rows), 12))
        recorded.append(recorder.trace.outputs)
    everything, *parts = recorded
    for part in parts:
        for name in [("silu", "output"), ("norm", "output")]:
            assert part[name] and part[name].items() <= everything[name].items()
    for name, rows in everything.items():
        assert len(set(rows.values())) == 5, name


def test_a_trace_without_a_counterpart_is_no_proof():
    model = Heads()
    recorder = parity_trace.Recorder(model)
    recorder.rows = [(0, 0), (0, 1)]
    with torch.no_grad(), recorder:
        model(torch.randn(2, 12))
    assert parity_trace.first_difference(recorder.trace, recorder.trace, lambda name: name)[1] is None
    with pytest.raises(ValueError, match="nothing was compared"):
        parity_trace.first_difference(recorder.trace, recorder.trace, lambda name: f"other.{name}")
