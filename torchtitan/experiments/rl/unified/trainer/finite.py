# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A loss or gradient that is not finite ends the run, and its batch is kept for whoever looks for the cause."""

import dataclasses
import math
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.distributed.utils import dist_sum
from torchtitan.experiments.rl.unified.errors import NonFiniteError
from torchtitan.experiments.rl.unified.messages import Trajectory


def step_figures(losses: list[torch.Tensor], model: nn.Module, mesh: DeviceMesh | None) -> dict[str, float]:
    """Loss and gradient norm of a step after its last backward pass, on every rank; collective.

    Args:
        losses: of this rank's microbatches.
        model: holds the gradients.
        mesh: of the ranks that `losses` are summed over; None: this one alone.
    """
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return {"loss": dist_sum(torch.stack(losses).sum(), mesh), "grad_norm": float(norm)}


def stop_unless_finite(
    figures: dict[str, float], folder: str, step: int, trajectories: list[Trajectory], advantages: torch.Tensor
) -> None:
    """Returns if all of `figures` are finite; if not, raises, and rank 0 writes `<folder>/nonfinite_step_N.pt` before.

    The file holds plain dicts, lists and tensors, for `torch.load`.

    Args:
        figures: loss and gradient norm by name, the same on every rank: all of them stop, or none.
        folder: of the run.
        step: that is about to be taken.
        trajectories: of the whole step.
        advantages: fp32 (trajectories,).

    Raises:
        NonFiniteError: names the step, the figures and, on rank 0, the file.
    """
    if all(map(math.isfinite, figures.values())):
        return
    path = Path(folder).absolute() / f"nonfinite_step_{step}.pt"
    where = f"its batch (trajectories, advantages) is in {path}"
    if torch.distributed.get_rank() == 0:
        rows = [dataclasses.asdict(trajectory) for trajectory in trajectories]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"step": step, **figures, "trajectories": rows, "advantages": advantages}, path)
        except (OSError, RuntimeError) as error:
            where = f"its batch could not be written to {path}: {error}"
    values = ", ".join(f"{name} {value}" for name, value in figures.items())
    raise NonFiniteError(
        f"step {step} was not taken, its figures are not finite: {values}; {where}. Look there for a value that is "
        "not finite, or lower [optimizer] lr; started again, the job goes on from its last checkpoint"
    )
