# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the sampling and evaluation settings mean the same to both hosts."""

import math
from pathlib import Path

from torchtitan.experiments.rl.unified.config.load import JobConfig


def check_sampling(config: JobConfig) -> None:
    """The sampling settings mean the same to the engine and to the trainer.

    Raises:
        ValueError: names the setting and its range.
    """
    sampling = config.sampling
    _check_temperature("[sampling]", sampling.temperature)
    if sampling.max_tokens < 1:
        raise ValueError(f"[sampling] max_tokens = {sampling.max_tokens}: a completion has at least 1 token")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"[sampling] top_p = {sampling.top_p}: it must be above 0 and at most 1, which is off")
    if sampling.top_k < 0:
        raise ValueError(f"[sampling] top_k = {sampling.top_k}: it must not be negative; 0 is off")
    if "" in sampling.stop:
        raise ValueError("[sampling] stop has an empty string, which every completion would end at: leave it out")


def check_evaluation(config: JobConfig) -> None:
    """Held-out problems are to be had, and the settings of their evaluation fit each other.

    Raises:
        ValueError: says which setting to change.
    """
    evaluation, training = config.evaluation, config.training
    if not evaluation.interval:
        return
    _check_temperature("[evaluation]", evaluation.temperature)
    if evaluation.interval < 0 or evaluation.problems < 0:
        raise ValueError("[evaluation] interval and problems must not be negative")
    if not evaluation.k or not all(1 <= k <= evaluation.samples for k in evaluation.k):
        raise ValueError(
            f"[evaluation] k = {evaluation.k} with samples = {evaluation.samples}: pass@k takes at least k samples "
            "of each problem, and k at least 1"
        )
    if evaluation.samples > 1 and not evaluation.temperature:
        raise ValueError(
            f"[evaluation] samples = {evaluation.samples} at temperature 0 would all be the same; raise the "
            "temperature or take 1 sample"
        )
    if training.dataset_path and Path(training.dataset_path).is_file() and evaluation.dataset_path is None:
        raise ValueError(
            f"[evaluation] has no problems of its own: the file {training.dataset_path} is what the job trains on; "
            "give held-out rows in [evaluation] dataset_path, or set [evaluation] interval = 0"
        )


def _check_temperature(section: str, temperature: float) -> None:
    # vLLM raises anything between to 0.01, which would be another distribution than the trainer's.
    if not (temperature == 0 or 0.01 <= temperature < math.inf):
        raise ValueError(f"{section} temperature = {temperature}: it must be 0 (the likeliest token) or at least 0.01")
