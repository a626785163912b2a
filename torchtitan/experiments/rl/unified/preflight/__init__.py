# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The one place that says no: what can be known to be wrong with a job before a process is spawned."""

from dataclasses import dataclass

from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.preflight.batch import check_batch
from torchtitan.experiments.rl.unified.preflight.cluster import check_cluster
from torchtitan.experiments.rl.unified.preflight.estimate import estimate_job, JobEstimate
from torchtitan.experiments.rl.unified.preflight.model import check_arithmetic, check_checkpoint
from torchtitan.experiments.rl.unified.preflight.sampling import check_evaluation, check_sampling
from torchtitan.experiments.rl.unified.rollout.evaluation import Evaluation
from torchtitan.experiments.rl.unified.rollout.task import Task
from torchtitan.experiments.rl.unified.weights.checks import check_transport

__all__ = ["check", "Job"]


@dataclass(frozen=True)
class Job:
    """A checked job.

    Attributes:
        task: its prompts and rewards.
        evaluation: its held-out problems.
        estimate: what it will take.
    """

    config: JobConfig
    task: Task
    evaluation: Evaluation
    estimate: JobEstimate

    def close(self) -> None:
        """Ends the processes of a user's rewards."""
        self.task.close()
        self.evaluation.close()


def check(config: JobConfig) -> Job:
    """The job, if it can run here; its prompts are loaded and its rewards are there.

    Raises:
        ValueError: says what is wrong, where and what to do.
    """
    check_checkpoint(config)
    check_batch(config)
    check_sampling(config)
    check_evaluation(config)
    check_arithmetic(config)
    check_transport(config)
    check_cluster(config)
    return Job(config, Task(config), Evaluation(config), estimate_job(config))
