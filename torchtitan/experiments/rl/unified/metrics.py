# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A run's record: metrics.jsonl, TensorBoard, samples, the picture, and what the terminal shows."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, ExitStack
from pathlib import Path
from typing import Any, TextIO, TYPE_CHECKING

import torch
from torchtitan.components.metrics import LoggerContainer, TensorBoardLogger, WandBLogger
from torchtitan.experiments.rl.unified.job_config import JobConfig, write_toml
from torchtitan.experiments.rl.unified.parity import ParityReport
from torchtitan.experiments.rl.unified.rollout.task import Scored
from torchtitan.experiments.rl.unified.rollout.trajectory import Trajectory
from torchtitan.experiments.rl.unified.step_stats import StepStats
from tqdm import tqdm

if TYPE_CHECKING:
    from torchtitan.experiments.rl.unified.trainer import StepResult


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that its block takes to `phases[name]`."""
    start = time.perf_counter()
    yield
    phases[name] = phases.get(name, 0.0) + time.perf_counter() - start


class StepRecord:
    """One step in the making: times its phases, then turns what came out of them into a line of metrics.

    Args:
        config: the job.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.metrics: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self.evaluation: dict[str, float] = {}
        self.phases: dict[str, float] = {}
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
        self.metrics = {
            "step": step.step,
            "policy_version": step.step,
            "staleness": step.step - 1 - min(t.policy_version for t in trajectories),
            "reward_mean": float(totals.mean()),
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            "lr": step.lr,
            "tokens_compared": parity.tokens_compared,
            "mismatched_tokens": parity.mismatched_tokens,
            "max_logprob_difference": parity.max_difference,
            **sum((r.stats for r in results), start=StepStats()).means(),
            "advantage_std": float(scored.advantages.std(correction=0)),
            "completion_tokens_mean": sum(lengths) / len(lengths),
            "completion_tokens_max": max(lengths),
            "truncated_fraction": sum(t.truncated for t in trajectories) / len(trajectories),
            "tokens_per_second": sum(lengths) / (seconds - self.phases.get("evaluate", 0.0)),
            "seconds": seconds,
            **{f"seconds_{name}": seconds for name, seconds in self.phases.items()},
            **self.evaluation,
        }
        self.samples = [
            {
                "step": step.step,
                "prompt_uid": t.request.uid,
                "sample": t.request.sample,
                "prompt_ids": t.request.prompt_ids,
                "completion": t.text,
                "completion_tokens": len(t.completion_ids),
                "finish_reason": t.finish_reason,
                "reward": r.total,
                "reward_parts": r.parts,
                "policy_version": t.policy_version,
            }
            for t, r in zip(trajectories[: self.config.rl.log_samples], scored.rewards)
        ]


class RunRecord:
    """Writes what a run does to its folder: a step is on disk before the next one starts. A context manager.

    Args:
        config: the job; `job.dump_folder` is the run's folder.
        first_step: steps already taken.
    """

    def __init__(self, config: JobConfig, first_step: int = 0) -> None:
        self.config = config
        self.folder = Path(config.job.dump_folder)
        self.first_step = first_step
        self.history: list[dict[str, Any]] = []

    def __enter__(self) -> "RunRecord":
        self.folder.mkdir(parents=True, exist_ok=True)
        write_toml(self.config, self.folder / "config.toml")
        self.history = [m for m in _read(self.folder / "metrics.jsonl") if m["step"] <= self.first_step]
        samples = [s for s in _read(self.folder / "samples.jsonl") if s["step"] <= self.first_step]
        self._stack = ExitStack()
        # Steps after the checkpoint are taken again: their lines go.
        self._metrics = self._stack.enter_context(_rewrite(self.folder / "metrics.jsonl", self.history))
        self._samples = self._stack.enter_context(_rewrite(self.folder / "samples.jsonl", samples))
        self._loggers = self._stack.enter_context(closing(self._build_loggers()))
        steps = self.config.training.steps
        self._bar = self._stack.enter_context(
            tqdm(total=steps, initial=self.first_step, unit="step", dynamic_ncols=True, desc=self.config.rl.mode)
        )
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._stack.close()
        if self.history:
            draw(self.history, self.folder / "reward.png")

    @contextmanager
    def step(self) -> Iterator[StepRecord]:
        """A step to fill; it is written when the block ends without an error."""
        step = StepRecord(self.config)
        yield step
        metrics = step.metrics
        self.history.append(metrics)
        _append(self._metrics, metrics)
        for sample in step.samples:
            _append(self._samples, sample)
        self._loggers.log({key: value for key, value in metrics.items() if key != "step"}, metrics["step"])
        self._bar.set_postfix_str(
            f"reward {metrics['reward_mean']:.3f}, loss {metrics['loss']:+.4f}, "
            f"{metrics['tokens_per_second']:.0f} tok/s, "
            f"parity {metrics['mismatched_tokens']} of {metrics['tokens_compared']} differ"
        )
        self._bar.update()

    def summary(self) -> str:
        """What came of the run and where it lies, some lines of text."""
        if not self.history:
            return f"no step was taken: {self.folder} stands at its last step"
        first, last = (
            sum(m["reward_mean"] for m in part) / len(part) for part in (self.history[:10], self.history[-10:])
        )
        compared, mismatched = (sum(m[k] for m in self.history) for k in ("tokens_compared", "mismatched_tokens"))
        return (
            f"{len(self.history)} steps in {sum(m['seconds'] for m in self.history):.0f} s\n"
            f"reward   {first:.3f} (mean of the first 10 steps) -> {last:.3f} (last 10)\n"
            f"parity   {mismatched} of {compared} sampled tokens differ between generator and trainer\n"
            f"{self._held_out()}"
            f"outputs  {self.folder}: metrics.jsonl, samples.jsonl, config.toml, reward.png, tb/"
        )

    def _held_out(self) -> str:
        """Pass rates before and after the run, a line for each k; empty without evaluations."""
        lines = []
        for key in sorted({key for m in self.history for key in m if key.startswith("eval_pass@")}):
            name = key.removeprefix("eval_")
            before = [m[f"eval_before_{name}"] for m in self.history if f"eval_before_{name}" in m]
            rates = [f"{rate:.3f}" for rate in (*before, [m[key] for m in self.history if key in m][-1])]
            lines.append(f"{name:<8} {' -> '.join(rates)} on held-out problems\n")
        return "".join(lines)

    def _build_loggers(self) -> LoggerContainer:
        loggers = LoggerContainer()
        folder = str(self.folder / self.config.metrics.save_tb_folder)
        if self.config.metrics.enable_tensorboard:
            loggers.add_logger(TensorBoardLogger(folder))
        if self.config.metrics.enable_wandb:
            loggers.add_logger(WandBLogger(folder, self.config))
        return loggers


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """Reward and parity over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [m["step"] for m in history]
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=[3, 1])
    top.plot(steps, [m["reward_mean"] for m in history], color="tab:blue")
    top.set_ylabel("mean reward")
    top.grid(alpha=0.3)
    bottom.bar(steps, [m["tokens_compared"] for m in history], color="tab:green", label="compared")
    bottom.bar(steps, [m["mismatched_tokens"] for m in history], color="tab:red", label="different bits")
    bottom.set_ylabel("sampled tokens")
    bottom.set_xlabel("step")
    bottom.margins(y=0.35)
    bottom.legend(loc="upper right", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def set_aside(config: JobConfig) -> Path | None:
    """Renames the job's folder if it holds a run that this one does not go on with; returns its new name."""
    folder = Path(config.job.dump_folder)
    resumes = config.checkpoint.enable and (folder / config.checkpoint.folder).exists()
    if resumes or not (folder / "metrics.jsonl").exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, without a last line that was cut off in the middle of writing."""
    if not path.exists():
        return []
    *rows, _ = path.read_text().split("\n")
    try:
        return [json.loads(row) for row in rows]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSONL ({error}): mend it or move the folder away") from error


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> TextIO:
    """Replaces the file by `rows` and returns it open for more; a crash leaves the old file or the new one."""
    draft = path.with_suffix(".tmp")
    file = open(draft, "w")
    for row in rows:
        _append(file, row)
    draft.rename(path)
    return file


def _append(file, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())
