# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""One step's line of metrics, and its samples."""

import time
from typing import Any, TYPE_CHECKING

import torch
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.messages import ParityReport, Scored, TokenStats, Trajectory

if TYPE_CHECKING:
    from torchtitan.experiments.rl.unified.messages import StepResult


class StepRecord:
    """One step in the making: times its phases, then turns what came out of them into a line of metrics.

    Args:
        config: the job.

    Attributes:
        phases: seconds by the phase's name; a phase that ran beside the others is set by whoever ran it.
        weights_changed: share of the weights, as the generators have them, that the step changed.
        evaluation: held-out figures by name, if there was an evaluation in this step; they go into the metrics.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.phases: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.weights_changed: float | None = None
        self.metrics: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self.trajectories: list[Trajectory] = []
        self._start = time.perf_counter()

    def finish(self, trajectories: list[Trajectory], scored: Scored, results: list["StepResult"]) -> None:
        """Fills `metrics` and `samples`.

        Args:
            trajectories, scored: of the step.
            results: of each trainer rank.
        """
        seconds = time.perf_counter() - self._start
        lengths = [len(t.completion_ids) for t in trajectories]
        totals = torch.tensor([r.total for r in scored.rewards], dtype=torch.float64)
        parity = sum((r.parity for r in results), start=ParityReport())
        step = results[0]
        oldest = min(t.policy_version for t in trajectories)
        self.trajectories = trajectories
        self.metrics = {
            "step": step.step,
            "policy_version": step.step,
            "reward_mean": float(totals.mean()),
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            "lr": step.lr,
            "tokens_sampled": sum(lengths),
            "tokens_compared": parity.tokens_compared,
            "tokens_unverifiable": parity.tokens_unverifiable,
            "mismatched_tokens": parity.mismatched_tokens,
            "max_logprob_difference": parity.max_difference,
            **sum((r.stats for r in results), start=TokenStats()).means(),
            "groups_without_signal": scored.without_signal,
            **({} if scored.timeouts is None else {"reward_timeouts": scored.timeouts}),
            "advantage_std": float(scored.advantages.std(correction=0)),
            "completion_tokens_mean": sum(lengths) / len(lengths),
            "completion_tokens_max": max(lengths),
            "truncated_fraction": sum(t.truncated for t in trajectories) / len(trajectories),
            "version_min": oldest,
            "staleness_max": step.step - 1 - oldest,
            "tokens_per_second": sum(lengths) / (seconds - self.phases.get("evaluate", 0.0)),
            "seconds": seconds,
            **{f"seconds_{name}": value for name, value in self.phases.items()},
            **({} if self.weights_changed is None else {"weights_changed": self.weights_changed}),
            **self.evaluation,
        }
        chosen = notable(trajectories, totals.tolist(), self.config.rl.log_samples)
        self.samples = [self._sample(i, kind, trajectories[i], scored) for i, kind in sorted(chosen.items())]

    def _sample(self, index: int, kind: str, trajectory: Trajectory, scored: Scored) -> dict[str, Any]:
        reward, (prompt, answer) = scored.rewards[index], scored.asked[index]
        return {
            "step": self.metrics["step"],
            "kind": kind,
            "prompt_uid": trajectory.request.uid,
            "sample": trajectory.request.sample,
            "prompt": prompt,
            "answer": answer,
            "completion": trajectory.text,
            "completion_tokens": len(trajectory.completion_ids),
            "finish_reason": trajectory.finish_reason,
            "reward": reward.total,
            "reward_parts": reward.parts,
            "advantage": float(scored.advantages[index]),
            "policy_version": trajectory.policy_version,
        }


def notable(trajectories: list[Trajectory], rewards: list[float], count: int) -> dict[int, str]:
    """Indices of up to `count` completions worth reading, and why each: "best", "worst" or "truncated".

    In turn the best, the worst and a truncated one of those that are left; of equals one whose prompt was chosen least.
    """
    chosen: dict[int, str] = {}
    while len(chosen) < min(count, len(rewards)):
        for kind, sign in {"best": -1, "worst": 1, "truncated": 0}.items():
            uids = [trajectories[i].request.uid for i in chosen]
            left = [i for i, t in enumerate(trajectories) if i not in chosen and (t.truncated or kind != "truncated")]
            if left and len(chosen) < count:
                chosen[min(left, key=lambda i: (sign * rewards[i], uids.count(trajectories[i].request.uid), i))] = kind
    return chosen
