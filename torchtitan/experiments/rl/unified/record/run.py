# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A run's record: metrics.jsonl, TensorBoard, samples, the report, and what the terminal shows."""

import asyncio
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, ExitStack, suppress
from pathlib import Path
from typing import Any

from torchtitan.components.metrics import LoggerContainer, TensorBoardLogger, WandBLogger
from torchtitan.experiments.rl.unified.config.load import JobConfig, write_toml
from torchtitan.experiments.rl.unified.record import jsonl
from torchtitan.experiments.rl.unified.record.provenance import checkpoint_digests, read_starts, write_provenance
from torchtitan.experiments.rl.unified.record.replay import ReplayFolder
from torchtitan.experiments.rl.unified.record.report import write_report
from torchtitan.experiments.rl.unified.record.step import StepRecord
from tqdm import tqdm

logger = logging.getLogger(__name__)
# Where the progress is not on a terminal.
SECONDS_A_LINE = 5.0


class RunRecord:
    """Writes what a run does to its folder: a step is on disk before the next one starts. A context manager.

    Args:
        config: the job; `job.dump_folder` is the run's folder.
        first_step: steps already taken.
        digests: of the checkpoint, as `checkpoint_digests` takes its time to find them.
    """

    def __init__(self, config: JobConfig, first_step: int = 0, digests: dict[str, str] | None = None) -> None:
        self.config = config
        self.digests = checkpoint_digests(config) if digests is None else digests
        self.folder = Path(config.job.dump_folder)
        self.first_step = first_step
        self.history: list[dict[str, Any]] = []
        records = config.rl.record_replay and config.checkpoint.enable and not config.checkpoint.load_only
        self.replay = ReplayFolder(config, first_step) if records else None

    def __enter__(self) -> "RunRecord":
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_config(self.config, self.folder)
        write_provenance(self.config, self.folder / "provenance.json", self.first_step, self.digests)
        steps = self.config.training.steps
        with ExitStack() as stack:
            self._loggers = stack.enter_context(closing(self._build_loggers()))
            self._bar = stack.enter_context(_bar(steps, self.config.rl.mode))
            self._files = stack.enter_context(ExitStack())
            self.rewind(self.first_step)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with ExitStack() as stack:  # Each of these is done, whatever becomes of the others.
            stack.callback(self._report, _ending(kind, error))
            if self.replay:
                stack.callback(self.replay.record_checkpoints)
            stack.push(self._stack)

    def _report(self, ending: str) -> None:
        try:
            write_report(self.folder, ending)
        except Exception as error:  # An ornament: the run is what its files say.
            logger.warning("no report of %s could be written: %s: %s", self.folder, type(error).__name__, error)

    def rewind(self, step: int) -> None:
        """Forgets what came after `step`, which the trainer stands at again: those steps are taken again."""
        self._files.close()
        metrics, samples = (self.folder / name for name in ("metrics.jsonl", "samples.jsonl"))
        self.history = list(_until(step, jsonl.read(metrics)))
        self._metrics = self._files.enter_context(jsonl.rewrite(metrics, self.history))
        self._samples = self._files.enter_context(jsonl.rewrite(samples, _until(step, jsonl.read(samples))))
        if self.replay:
            self.replay.rewind(step)
        self._bar.n = step
        self._bar.refresh()

    def first(self) -> StepRecord:
        """The first step to fill."""
        return StepRecord(self.config)

    def write(self, step: StepRecord) -> StepRecord:
        """Adds a finished step to the files and to what the terminal shows; returns the next one, its clock running."""
        metrics = step.metrics
        self.history.append(metrics)
        # Samples first: a step that has its metrics has all of its record.
        jsonl.append(self._samples, step.samples)
        if self.replay:
            self.replay.record(metrics["step"], step.trajectories)
        jsonl.append(self._metrics, [metrics])
        self._loggers.log({key: value for key, value in metrics.items() if key != "step"}, metrics["step"])
        self._bar.set_postfix_str(
            f"reward {metrics['reward_mean']:.3f}, loss {metrics['loss']:+.4f}, "
            f"{metrics['tokens_per_second']:.0f} tok/s, "
            f"parity {metrics['mismatched_tokens']} differ, compared {metrics['tokens_compared']} of "
            f"{metrics['tokens_sampled']}",
            refresh=False,
        )
        self._bar.update()
        return StepRecord(self.config)

    def summary(self) -> str:
        """What came of the run and where it lies, some lines of text."""
        if not self.history:
            return f"no step was taken: {self.folder} stands at its last step"
        first, last = (
            sum(m["reward_mean"] for m in part) / len(part) for part in (self.history[:10], self.history[-10:])
        )
        names = ("mismatched_tokens", "tokens_compared", "tokens_sampled", "tokens_unverifiable")
        mismatched, compared, sampled, unverifiable = (sum(m.get(name, 0) for m in self.history) for name in names)
        changed = [share for m in self.history if (share := m.get("weights_changed")) is not None]
        moved = f"weights  {sum(changed) / len(changed):.1%} of the generator's changed a step\n" if changed else ""
        gone = f"; of {unverifiable} the weights were gone after a resume" if unverifiable else ""
        return (
            f"{len(self.history)} steps in {sum(m['seconds'] for m in self.history):.0f} s\n"
            f"reward   {first:.3f} (mean of the first 10 steps) -> {last:.3f} (last 10)\n"
            f"parity   {mismatched} sampled tokens differ between generator and trainer, compared {compared} of "
            f"{sampled}{gone}\n"
            f"{self._held_out()}{moved}"
            f"outputs  {self.folder}: report.html, metrics.jsonl, samples.jsonl, config.toml, tb/"
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


class _Lines:
    """Standard error for a bar that no terminal shows: each of its states on a line, and nothing where nobody reads."""

    def write(self, text: str) -> None:
        if text := text.strip():
            with suppress(BrokenPipeError):
                print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def _bar(steps: int, name: str) -> tqdm:
    if sys.stderr.isatty():
        return tqdm(total=steps, unit="step", dynamic_ncols=True, desc=name)
    return tqdm(total=steps, unit="step", ncols=0, desc=name, mininterval=SECONDS_A_LINE, file=_Lines())


def goes_on(config: JobConfig) -> bool:
    """Whether the job goes on with the run in its folder, if there is one.

    Raises:
        ValueError: it does, and that run's metrics or samples cannot be read (names file and line).
    """
    folder = Path(config.job.dump_folder)
    if not config.checkpoint.enable or not (folder / config.checkpoint.folder).exists():
        return False
    for name in ("metrics.jsonl", "samples.jsonl"):
        for _ in jsonl.read(folder / name):
            pass
    read_starts(folder / "provenance.json")
    return True


def check_aside(config: JobConfig) -> bool:
    """Whether the job's folder holds a run that this one does not go on with.

    Raises:
        ValueError: it does, and cannot be renamed.
    """
    folder = Path(config.job.dump_folder)
    if goes_on(config) or not (folder / "metrics.jsonl").exists():
        return False
    here = Path.cwd().is_relative_to(folder.resolve())
    if here or folder.is_mount():
        raise ValueError(
            f"[job] dump_folder {folder} holds an earlier run, which would be moved aside, and is "
            f"{'where you are' if here else 'a mount point'}: name a folder in it"
        )
    return True


def set_aside(config: JobConfig) -> Path | None:
    """Renames the job's folder if it holds a run that this one does not go on with; returns its new name.

    Raises:
        ValueError: it has to, and cannot.
    """
    if not check_aside(config):
        return None
    folder, number = Path(config.job.dump_folder), 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def _write_config(config: JobConfig, folder: Path) -> None:
    """Writes config.toml; what an earlier start was told otherwise is kept as config.1.toml, config.2.toml ..."""
    file, draft = folder / "config.toml", folder / "config.toml.tmp"
    write_toml(config, draft)
    if file.exists() and file.read_text(encoding="utf-8") != draft.read_text(encoding="utf-8"):
        number = 1
        while (kept := folder / f"config.{number}.toml").exists():
            number += 1
        file.rename(kept)
    draft.rename(file)


def _until(step: int, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["step"] <= step)


def _ending(kind: type[BaseException] | None, error: BaseException | None) -> str:
    """How a run ended, for its report; empty where all went well."""
    if kind is None:
        return ""
    interrupted = issubclass(kind, (KeyboardInterrupt, asyncio.CancelledError))
    return "interrupted" if interrupted else f"failed: {error}"
