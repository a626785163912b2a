# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Keys that do nothing beside the others of a job config: that they are set in vain is said. Loads no torch."""

from collections.abc import Callable, Iterator
from typing import Any

_SAVING = ("interval", "keep_latest_k", "async_mode", "load_only", "enable_first_step_checkpoint", "last_save_in_hf")
_EVALUATION = ("problems", "samples", "k", "temperature", "seed", "reward", "dataset_path")
_RECOMPUTATION = ("selective_ac_option", "early_stop", "preserve_rng_state", "determinism_check", "debug")

# What they are without, the keys, and whether it is so.
IDLE: tuple[tuple[str, tuple[str, ...], Callable[[Any], bool]], ...] = (
    (
        "[checkpoint] enable",
        (*(f"checkpoint.{key}" for key in _SAVING), "rl.record_replay"),
        lambda config: not config.checkpoint.enable,
    ),
    (
        "[evaluation] interval",
        tuple(f"evaluation.{key}" for key in _EVALUATION),
        lambda config: not config.evaluation.interval,
    ),
    (
        '[weight_sync] transport = "file"',
        ("weight_sync.folder",),
        lambda config: config.weight_sync.transport != "file",
    ),
    (
        "a [policy_loss] name that clips",
        ("policy_loss.clip_low", "policy_loss.clip_high"),
        lambda config: config.policy_loss.name == "reinforce",
    ),
    (
        "[trajectory_queue] max_staleness",
        ("policy_loss.tis_cap", "parity.stale_share"),
        lambda config: not config.trajectory_queue.max_staleness,
    ),
    (
        "[checkpoint] initial_load_path",
        ("checkpoint.initial_load_model_only",),
        lambda config: not config.checkpoint.initial_load_path,
    ),
    ("[parity] check", ("parity.stale_share",), lambda config: config.parity.check == "off"),
    (
        "[activation_checkpoint] mode",
        tuple(f"activation_checkpoint.{key}" for key in _RECOMPUTATION),
        lambda config: config.activation_checkpoint.mode == "none",
    ),
    ("[metrics] enable_tensorboard", ("metrics.save_tb_folder",), lambda config: not config.metrics.enable_tensorboard),
    (
        "[cluster] trainer or generators",
        ("cluster.address",),
        lambda config: not (config.cluster.trainer or config.cluster.generators),
    ),
)


def idle_keys(config: Any) -> Iterator[str]:
    """A line for all the keys that are not their defaults and do nothing for one reason."""
    plain = type(config)()
    for needed, paths, idle in IDLE:
        parts = [path.split(".") for path in paths if idle(config)]
        found = [(s, k) for s, k in parts if getattr(getattr(config, s), k) != getattr(getattr(plain, s), k)]
        if found:
            names = ", ".join(f"[{section}] {key}" for section, key in found)
            yield f"without {needed}, what is set as {names} does nothing"
