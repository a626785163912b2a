# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What the policy is asked and how its answers are judged: prompts, seeds, rewards, advantages."""

from dataclasses import replace
from typing import Any

import torch
from torchtitan.experiments.rl.unified.algorithms.advantages import advantage_estimator, share_without_signal
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.messages import completion_seed, Request, Scored, Trajectory
from torchtitan.experiments.rl.unified.rollout.datasets import load_prompts, Prompt
from torchtitan.experiments.rl.unified.rollout.rewards import RewardInput, Rewards


class Task:
    """The job's prompts and rewards. What can be wrong with them is found on construction.

    Args:
        config: the job.

    Raises:
        ValueError: no such rows or reward, or they cannot work.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.estimate = advantage_estimator(config.advantage.name, config.rl.group_size)
        self.rewards = Rewards(config.reward.weights, timeout_seconds=config.reward.timeout_seconds)
        self.prompts = load_prompts(config)
        self.rewards.check_answers((prompt.place, prompt.answer) for prompt in self.prompts.prompts)
        self._start = self.prompts.state_dict()
        self._prompts = {prompt.row: prompt for prompt in self.prompts.prompts}

    def close(self) -> None:
        """Ends the process of a user's reward, if there is one."""
        self.rewards.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the prompts stand, JSON-able."""
        return self.prompts.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on where `state_dict` was taken; None: at the start."""
        self.prompts.load_state_dict(state or self._start)

    def next_requests(self) -> list[Request]:
        """The next step's requests: `group_size` in a row for each of `prompts_per_step` prompts."""
        prompts = self.prompts.next_batch(self.config.rl.prompts_per_step)
        return [self._request(prompt, sample) for prompt in prompts for sample in range(self.config.rl.group_size)]

    def score(self, trajectories: list[Trajectory]) -> Scored:
        """Rewards and advantages of the completions of one step's requests, in their order."""
        asked = [self._prompts[trajectory.request.row] for trajectory in trajectories]
        inputs = reward_inputs(asked, trajectories, self.config.sampling.max_tokens)
        before = self.rewards.timeouts
        rewards = self.rewards.score(inputs)
        timeouts = None if before is None else self.rewards.timeouts - before
        if self.config.rl.truncated_completions == "zero_reward":
            # Being cut off must not raise a reward, either: a penalty (soft_overlong) stays.
            rewards = [replace(r, total=min(r.total, 0.0)) if t.truncated else r for r, t in zip(rewards, trajectories)]
        rewards_PG = torch.tensor([r.total for r in rewards]).view(-1, self.config.rl.group_size)
        asked = [(i.prompt, i.answer) for i in inputs]
        return Scored(rewards, self.estimate(rewards_PG).flatten(), asked, share_without_signal(rewards_PG), timeouts)

    def _request(self, prompt: Prompt, sample: int) -> Request:
        uid = f"epoch {prompt.epoch} row {prompt.row}"
        seed = completion_seed(self.config.debug.seed, uid, sample)
        return Request(uid, sample, list(prompt.prompt_ids), seed, prompt.row)


def reward_inputs(prompts: list[Prompt], trajectories: list[Trajectory], max_tokens: int) -> list[RewardInput]:
    """What rewards see of each trajectory and the prompt that it answers; `max_tokens` was its limit."""
    return [
        RewardInput(
            prompt=prompt.text,
            completion=trajectory.text,
            answer=prompt.answer,
            completion_tokens=len(trajectory.completion_ids),
            truncated=trajectory.truncated,
            max_completion_tokens=max_tokens,
        )
        for prompt, trajectory in zip(prompts, trajectories, strict=True)
    ]
