# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What this experiment adds to vLLM's workers."""

import functools
import pickle

import torch
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.messages import WeightUpdate
from torchtitan.experiments.rl.unified.weights.placement import check_arrived, not_placed
from torchtitan.experiments.rl.unified.weights.receiver import ReceivedWeights, Receiver


class PolicyWorker:
    """What this experiment adds to vLLM's workers (engine argument `worker_extension_cls`).

    Methods return what went wrong, empty if nothing did: an exception would lose its class on the way.

    Attributes:
        weights_in_place: those of the last update if the engine computes from the sender's memory, else None.
    """

    weights_in_place: ReceivedWeights | None = None

    def stage_policy_weights(self, update: bytes) -> str:
        """Checks a pickled WeightUpdate, every byte of it, and changes nothing."""
        try:
            self.staged_weights = self.policy_receiver.receive(pickle.loads(update))
            _check_fits(self.model_runner.get_model(), self.staged_weights.update)
        except WeightTransferError as error:
            return str(error)
        return ""

    def commit_policy_weights(self) -> str:
        """Gives the engine's model what was staged, and reads it back from there."""
        model = self.model_runner.get_model()
        staged, self.staged_weights = self.staged_weights, None
        try:
            model.update_weights(staged.items(), lasting=staged.update.lasting)
            staged.check_still_there()
            self.weights_in_place = staged if check_arrived(model.placements(), staged) else None
        except WeightTransferError as error:
            return str(error)
        if self.weights_in_place is not None:
            this_device().give_back_memory()
        return ""

    def check_policy_weights(self) -> str:
        """Looks whether the weights were there to the end, if the engine computes from the sender's memory."""
        try:
            if self.weights_in_place is not None:
                self.weights_in_place.check_still_there()
        except WeightTransferError as error:
            return f"overwritten while in use: {error}"
        return ""

    @functools.cached_property
    def policy_receiver(self) -> Receiver:
        return Receiver(lambda handle: handle.open(self.vllm_config, self.device))


def _check_fits(model: torch.nn.Module, update: WeightUpdate) -> None:
    """The update brings each weight of the engine's model, in its shape and dtype, and no other."""
    placements = model.placements()
    given = {entry.spec.name: entry.spec for entry in update.entries}
    if placements.keys() != given.keys():
        raise WeightTransferError(
            f"weights of version {update.version} are not those of the engine's model: "
            f"{sorted(placements.keys() ^ given.keys())} do not match"
        )
    for name, placement in placements.items():
        expected, found = (placement.local.dtype, placement.shape), (given[name].dtype, given[name].shape)
        if expected != found:
            raise WeightTransferError(
                f"weights of version {update.version}: {name} came as {found}, the engine has {expected}"
            )
    if unreached := not_placed(model, placements):
        raise WeightTransferError(f"no weight update reaches {unreached} of the engine's model")
