# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The one place that says no: what can be known to be wrong with a job before a process is spawned."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.experiments.rl.unified.algorithms.advantages import advantage_estimator
from torchtitan.experiments.rl.unified.algorithms.losses import policy_loss
from torchtitan.experiments.rl.unified.config.checks import contradictions, warnings
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.isolation import other_users
from torchtitan.experiments.rl.unified.preflight.cluster import check_cluster
from torchtitan.experiments.rl.unified.preflight.estimate import estimate_job, JobEstimate
from torchtitan.experiments.rl.unified.preflight.machine import CHECKS as MACHINE
from torchtitan.experiments.rl.unified.preflight.model import (
    check_arithmetic,
    check_checkpoint,
    check_recomputation,
    check_resume,
    check_vocabulary,
    lost_updates,
    model_of_job,
)
from torchtitan.experiments.rl.unified.preflight.resume import (
    changed_settings,
    check_files,
    check_position,
    check_settings,
)
from torchtitan.experiments.rl.unified.preflight.tokens import check_tokens
from torchtitan.experiments.rl.unified.record.owner import check_free
from torchtitan.experiments.rl.unified.record.run import check_aside, goes_on
from torchtitan.experiments.rl.unified.rollout.datasets import load_prompts, PromptDataset, QA_DATASETS
from torchtitan.experiments.rl.unified.rollout.evaluation import Evaluation
from torchtitan.experiments.rl.unified.rollout.rewards import Rewards
from torchtitan.experiments.rl.unified.rollout.rows import read_rows
from torchtitan.experiments.rl.unified.rollout.task import Task
from torchtitan.experiments.rl.unified.weights.checks import check_transport

__all__ = ["check", "Job"]


@dataclass(frozen=True)
class Job:
    """A checked job.

    Attributes:
        task: its prompts and rewards.
        evaluation: its held-out problems.
        completion_ends: when one does, in words.
        warnings: what is allowed and hardly meant, slow or tight; and what a resume changes.
    """

    config: JobConfig
    task: Task
    evaluation: Evaluation
    completion_ends: str
    warnings: list[str]

    def close(self) -> None:
        """Ends the processes of a user's rewards."""
        self.task.close()
        self.evaluation.close()


def check(config: JobConfig) -> Job:
    """The job, if it can run here; its prompts are loaded and its rewards are there.

    Raises:
        ValueError: a line for each thing that is wrong, where, and what to do. What depends on a thing that is wrong is
            not looked at.
    """
    problems = contradictions(config)

    def passes(look: Callable[[JobConfig], Any], *keys: str) -> Any:
        """What `look` returns, True for nothing; None if it finds a problem, or one was found with `[section] key`."""
        if any(problem.startswith(keys) for problem in problems):
            return None
        try:
            found = look(config)
        except (ValueError, OSError) as error:
            problems.append(" ".join(str(error).split()))
            return None
        return True if found is None else found

    for look in MACHINE:
        passes(look)
    model = passes(model_of_job)
    checkpoint = model and passes(check_checkpoint)
    estimate: JobEstimate | None = None
    if model:
        passes(check_arithmetic)
        passes(check_vocabulary)
        passes(check_recomputation, "[activation_checkpoint]")
        estimate = passes(estimate_job, "[trainer] cores", "[generator] cores")
    resumes = checkpoint and passes(check_resume) and passes(check_settings) and passes(check_files)
    passes(lambda job: goes_on(job) or check_aside(job) or None, "[job] dump_folder") and passes(
        lambda job: check_free(Path(job.job.dump_folder))
    )
    passes(check_transport)
    passes(check_cluster)
    passes(lambda job: policy_loss(job.policy_loss) and None)
    task = checkpoint and passes(Task, "[reward.weights]")
    evaluation = checkpoint and passes(Evaluation)
    ends = task and passes(lambda job: check_tokens(job, task, evaluation.problems if evaluation else []))
    resumes and task and passes(lambda job: check_position(job, task))
    remarks = task and evaluation and passes(lambda _: evaluation.remarks(task.prompts.prompts))
    if not task:
        # Its parts, one by one: each may have a problem of its own.
        passes(lambda job: advantage_estimator(job.advantage.name, job.rl.group_size) and None)
        passes(
            lambda job: Rewards(job.reward.weights, timeout_seconds=job.reward.timeout_seconds).close(),
            "[reward.weights]",
        )
        passes(load_prompts if checkpoint else _read_rows)
    problems += estimate.refusals() if estimate else []
    if problems:
        for part in (task, evaluation):
            if part:
                part.close()
        raise ValueError("\n".join(dict.fromkeys(problems)))
    said = [
        *warnings(config),
        *_left_out(task.prompts),
        *_strangers(),
        *remarks,
        *lost_updates(config),
        *changed_settings(config),
        *estimate.warnings(),
    ]
    return Job(config, task, evaluation, ends, said)


def _read_rows(config: JobConfig) -> None:
    """The rows alone, where there is no tokenizer to make prompts of them."""
    if (name := config.training.dataset) not in QA_DATASETS:
        raise ValueError(f"Unknown dataset {name!r}; there are {', '.join(sorted(QA_DATASETS))}.")
    place = config.training.dataset_path or QA_DATASETS[name]
    read_rows(place, "train", config.data.question_column, config.data.answer_column)


def _left_out(prompts: PromptDataset) -> list[str]:
    if not prompts.dropped:
        return []
    left = f"{prompts.dropped} prompts that are too long are left out; {len(prompts.prompts)} are there to train on"
    return [f'[data] overlong_prompts = "drop": {left}']


def _strangers() -> list[str]:
    if not (users := other_users()):
        return []
    return [
        f"{', '.join(users[:5])} can reach this job's processes, and have code run as you, through Monarch's sockets: "
        "README section 9 says how to keep them out"
    ]
