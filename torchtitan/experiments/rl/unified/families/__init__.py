# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Model families: to add one, its file alone, with a FAMILY."""

import importlib
import pkgutil

from torchtitan.experiments.rl.unified.families.base import Family, packed, PolicyModel
from torchtitan.experiments.rl.unified.families.hf_config import read_config
from torchtitan.protocols.train_spec import TrainSpec

__all__ = ["Family", "family", "model_of_checkpoint", "policy_train_spec", "PolicyModel"]


def families() -> dict[str, Family]:
    """All there are, by name."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in _names())
    return {module.FAMILY.name: module.FAMILY for module in modules if hasattr(module, "FAMILY")}


def family(name: str) -> Family:
    """The family called `name`; ValueError lists those there are."""
    found = families()
    if name not in found:
        raise ValueError(f"[model] name {name!r}: there is no such family; families are {', '.join(sorted(found))}")
    return found[name]


def policy_train_spec(name: str) -> TrainSpec:
    """The TrainSpec of the family called `name`, as it runs here."""
    return family(name).train_spec()


def model_of_checkpoint(path: str, name: str = "", flavor: str = "") -> PolicyModel:
    """The model that lies in a checkpoint directory.

    Args:
        path: has a config.json.
        name: of its family; empty: config.json's model_type says it.
        flavor: torchtitan's name for the model, to be held against config.json; empty: config.json alone says.

    Raises:
        ValueError: there is no such directory, config.json is not one, is of an unknown family or of another one, has
            fields that the family does not cover, or is not the flavor's.
    """
    of_type = {kind: each for each in families().values() for kind in each.model_types}
    config = read_config(path, of_type)
    kind, found = config["model_type"], of_type[config["model_type"]]
    if name and family(name) is not found:
        raise ValueError(f"[model] name {name!r}, but {path}/config.json is of model_type {kind!r}: {found.name}")
    try:
        model = PolicyModel(found, packed(found.from_hf(config)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _named(model, flavor, path) if flavor else model


def _named(model: PolicyModel, flavor: str, path: str) -> PolicyModel:
    """The model under its flavor's name; ValueError if the two differ."""
    flavors = model.family.train_spec().model_args
    if flavor not in flavors:
        raise ValueError(f"[model] flavor {flavor!r}: {model.family.name} has {', '.join(flavors)}; or leave it empty")
    has, wants = model.family.to_hf(model.args), model.family.to_hf(flavors[flavor])
    differences = [
        f"{field}: {has.get(field, 'nothing')} in the checkpoint, {wants[field]} in the flavor"
        for field in wants
        if has.get(field) != wants[field]
    ]
    if differences:
        raise ValueError(
            f"{path}/config.json does not fit the model flavor {flavor}: {'; '.join(differences)}. Leave [model] "
            "flavor empty to take the checkpoint's own"
        )
    return PolicyModel(model.family, flavors[flavor], flavor)


def _names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.endswith("_vllm")]
