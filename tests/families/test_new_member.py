# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A family or a device that is not there yet: its file alone, and nothing else touched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets/qwen3_tiny"

# transformers knows the model_type, this project has no family for it.
FAMILY = """
from torchtitan.experiments.rl.unified.families import llama3

class Toy(llama3.Llama3):
    name = "toy"
    model_types = ("mistral",)

FAMILY = Toy()
"""

DEVICE = """
import contextlib
from torchtitan.experiments.rl.unified.devices.cpu import Cpu

class Toy(Cpu):
    installed = 0

    def install_arithmetic(self):
        super().install_arithmetic()
        Toy.installed += 1

    def arithmetic(self):
        return "toy, " + super().arithmetic()

DEVICE = Toy()
"""

# A folder of its own is put on the package's path; the TOML and the code are those that ship.
RUN = """
import sys
from torchtitan.experiments.rl.unified import devices, families
devices.__path__.append(sys.argv[1])
families.__path__.append(sys.argv[2])
import torch
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.preflight.model import check_arithmetic

model = model_of_checkpoint(sys.argv[3])
config = load_job_config(["--model.hf_assets_path", sys.argv[3]])
check_arithmetic(config)
with batch_invariant_mode():
    torch.nn.functional.linear(torch.ones(2, 4), torch.ones(3, 4))
print(model.family.name, model.geometry.layers, this_device().arithmetic().split(",")[0], this_device().installed)
"""


def test_a_family_and_a_device_are_a_file_each(tmp_path, monkeypatch):
    for name in ("devices", "families", "checkpoint"):
        (tmp_path / name).mkdir()
    (tmp_path / "devices/toy.py").write_text(DEVICE)
    (tmp_path / "families/toy.py").write_text(FAMILY)
    for file in ASSETS.iterdir():
        shutil.copy(file, tmp_path / "checkpoint" / file.name)
    config = {name: value for name, value in json.loads((ASSETS / "config.json").read_text()).items() if value}
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    monkeypatch.setenv("RL_DEVICE", "toy")
    folders = [str(tmp_path / name) for name in ("devices", "families", "checkpoint")]
    run = subprocess.run([sys.executable, "-c", RUN, *folders], capture_output=True, text=True, timeout=300)
    assert run.stdout == "toy 2 toy 1\n", run.stderr[-2000:]
