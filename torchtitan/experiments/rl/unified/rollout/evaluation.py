# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How many held-out problems the policy solves."""

import math
from dataclasses import replace

from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.messages import completion_seed, Request, Trajectory
from torchtitan.experiments.rl.unified.rollout.datasets import load_prompts, Prompt
from torchtitan.experiments.rl.unified.rollout.rewards import Rewards
from torchtitan.experiments.rl.unified.rollout.task import reward_inputs


class Evaluation:
    """pass@k on held-out problems: the same problems, with the same seeds, each time.

    Args:
        config: the job; `[evaluation]` says what is evaluated and when.

    Raises:
        ValueError: no such rows or reward, or settings that contradict each other.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config.evaluation
        self.steps = config.training.steps
        self.max_tokens = config.sampling.max_tokens
        self.sampling = replace(config.sampling, temperature=self.config.temperature)
        self.problems: list[Prompt] = []
        if not self.config.interval:
            return
        prompts = load_prompts(config, held_out=True)
        self.problems = prompts.next_batch(min(self.config.problems or len(prompts.prompts), len(prompts.prompts)))
        try:
            self.rewards = Rewards({self.config.reward: 1.0}, config.reward.timeout_seconds)
        except ValueError as error:
            raise ValueError(f"[evaluation] reward: {str(error).removeprefix('[reward.weights] ')}") from error
        self.rewards.check_answers((problem.place, problem.answer) for problem in self.problems)

    def close(self) -> None:
        """Ends the process of a user's reward, if there is one."""
        if self.config.interval:
            self.rewards.close()

    def remarks(self, prompts: list[Prompt]) -> list[str]:
        """What is hardly meant: fewer problems than were asked for, or some that are among the `prompts` of training.

        Raises:
            ValueError: all of them are.
        """
        found: list[str] = []
        if not self.config.interval:
            return found
        if self.config.problems > len(self.problems):
            found.append(f"[evaluation] problems = {self.config.problems}: there are only {len(self.problems)}")
        known = {(prompt.prompt_ids, prompt.answer) for prompt in prompts}
        among = [problem.place for problem in self.problems if (problem.prompt_ids, problem.answer) in known]
        if among:
            found.append(
                f"[evaluation] {len(among)} of its {len(self.problems)} problems are among those that the job trains on"
                f" ({among[0]}): give held-out rows in [evaluation] dataset_path, or set [evaluation] interval = 0"
            )
        if len(among) == len(self.problems):
            raise ValueError(found[-1])
        return found

    def due(self, version: int) -> bool:
        """Whether the policy of this version, as many steps old, is to be evaluated."""
        interval = self.config.interval
        return interval > 0 and (version % interval == 0 or version == self.steps)

    def requests(self) -> list[Request]:
        """`samples` completions in a row for each problem."""
        requests = []
        for problem in self.problems:
            uid = f"held-out row {problem.row}"
            for sample in range(self.config.samples):
                seed = completion_seed(self.config.seed, uid, sample)
                requests.append(Request(uid, sample, list(problem.prompt_ids), seed, problem.row, self.sampling))
        return requests

    def score(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """What the answers to `requests` are worth, as metrics.

        Args:
            trajectories: of one policy version, in the requests' order.

        Returns:
            "eval_pass@k" for each k, "eval_truncated_fraction" and "eval_completion_tokens_mean"; for the policy before
            training "eval_before_pass@k" and so on, as both may belong to one step.
        """
        samples = self.config.samples
        asked = [problem for problem in self.problems for _ in range(samples)]
        rewards = self.rewards.score(reward_inputs(asked, trajectories, self.max_tokens))
        passes = [reward.total >= 1 for reward in rewards]
        correct = [sum(passes[i : i + samples]) for i in range(0, len(passes), samples)]
        metrics = {
            f"pass@{k}": math.fsum(pass_at_k(samples, c, k) for c in correct) / len(correct) for k in self.config.k
        }
        metrics["truncated_fraction"] = sum(t.truncated for t in trajectories) / len(trajectories)
        metrics["completion_tokens_mean"] = sum(len(t.completion_ids) for t in trajectories) / len(trajectories)
        prefix = "eval_before_" if trajectories[0].policy_version == 0 else "eval_"
        return {f"{prefix}{name}": value for name, value in metrics.items()}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k completions passes, from `samples` of which `correct` do.

    One less the share of the subsets of k that hold no correct one. Source: Chen et al., Evaluating Large Language
    Models Trained on Code, arXiv:2107.03374, eq. 1.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)
