# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The claim of this experiment, checked: each sampled token's log-prob is the same bits in generator and trainer."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.errors import ParityError
from torchtitan.experiments.rl.unified.messages import ParityReport, Trajectory
from torchtitan.experiments.rl.unified.record.provenance import machine, versions
from torchtitan.experiments.rl.unified.trainer.packing import Microbatch


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
    difference = (generator_T - trainer_T).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()
    return ParityReport(
        len(generator_T),
        mismatched,
        float(difference),
        f"{where(first)}: generator {generator_T[first].item()!r}, trainer {trainer_T[first].item()!r}",
    )


def compare_microbatch(
    step: int, trajectories: list[Trajectory], microbatch: Microbatch, trainer_N: torch.Tensor, of_N: torch.Tensor
) -> ParityReport:
    """Compares the microbatch's sampled tokens where `of_N`.

    Args:
        step: that they are trained on in.
        trajectories: of the whole step.
        trainer_N: fp32 (sampled tokens,), the trainer's log-probs under the weights that sampled them.
        of_N: bool (sampled tokens,).
    """

    def where(token: int) -> str:
        rows = torch.arange(microbatch.labels.shape[1], device=microbatch.labels.device)[None]
        row = int(microbatch.sampled(rows)[of_N][token])
        sequence = int(torch.searchsorted(microbatch.cu_seqlens, row, right=True)) - 1
        trajectory = trajectories[microbatch.trajectories[sequence]]
        position = int(microbatch.positions[0, row]) + 1
        return (
            f"step {step}, prompt {trajectory.request.uid!r} sample {trajectory.request.sample}, "
            f"position {position} (policy version {trajectory.policy_version})"
        )

    return compare(microbatch.sampled(microbatch.generator_logprobs)[of_N], trainer_N[of_N], where)


def stop_at_mismatch(
    report: ParityReport,
    folder: str,
    step: int,
    trajectories: list[Trajectory],
    indices: list[int],
    trainer_N: torch.Tensor,
) -> None:
    """Raises ParityError if a token of `report` differs, and leaves what it takes to look for the cause in a file.

    `<folder>/parity_step_N.pt` (`parity_step_N_rank_R.pt` of ranks above 0) holds plain values, for `torch.load` and
    scripts/replay.py: the completions of the step with the generator's log-probs, which of them the microbatch has and
    the trainer's of those, what the bits depend on, versions and machine.

    Args:
        report: of the microbatch.
        folder: of the run.
        trajectories: of the step.
        indices: of the microbatch's.
        trainer_N: fp32 (sampled tokens,), the trainer's log-probs of all of the microbatch's.
    """
    if not report.mismatched_tokens:
        return
    rank = torch.distributed.get_rank()
    path = Path(folder).absolute() / (f"parity_step_{step}_rank_{rank}.pt" if rank else f"parity_step_{step}.pt")
    found = {
        "step": step,
        "first": report.first,
        "trajectories": [dataclasses.asdict(trajectory) for trajectory in trajectories],
        "compared": indices,
        "trainer_logprobs": list(trainer_N.cpu().split([len(trajectories[i].completion_ids) for i in indices])),
        "arithmetic": this_device().arithmetic(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": machine(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
        where = f"both sides are in {path}: python scripts/replay.py --parity {path} names the operation"
    except (OSError, RuntimeError) as error:
        where = f"{path} could not be written: {error}"
    raise ParityError(
        f"{report.mismatched_tokens} of {report.tokens_compared} sampled tokens have another log-prob in the "
        f"trainer than in the generator; first at {report.first}. Look for a weight update that did not reach "
        'the generator, or an operation that is not row-invariant; [parity] check = "report" only counts; ' + where
    )


def checked_share(step: int, trajectories: list[Trajectory], indices: Iterable[int], share: float) -> set[int]:
    """Which of the trajectories at `indices` are checked if `share` of them are to be; one at least.

    A hash of step, prompt and sample decides: every rank, and the run again, chooses the same.
    """

    def place(index: int) -> float:
        request = trajectories[index].request
        digest = hashlib.blake2b(f"{step}/{request.uid}/{request.sample}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    places = {index: place(index) for index in indices}
    least = min(places, key=places.__getitem__, default=None)
    return {index for index, value in places.items() if value < share or index == least}
