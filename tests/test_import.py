# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whose ``torchtitan.experiments.rl`` a process imports: the torchtitan wheel has a folder of that name as well."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "torchtitan" / "experiments" / "rl"
OUTER = Path(sysconfig.get_paths()["purelib"])

# Prints where a process that this one spawns finds two modules. `eval` is what it can unpickle without a main module.
FIND = """
import json, multiprocessing
CODE = '''[
    spec and spec.origin
    for spec in map(__import__("importlib.util").util.find_spec, [
        "torchtitan.experiments.rl.unified", "torchtitan.experiments.rl.vllm_compat"
    ])
]'''
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(json.dumps(pool.apply(eval, [CODE])))
"""


def make_environment(folder: Path, *install: str) -> Path:
    """An environment that sees this one's packages but runs none of its .pth files; returns its site-packages."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(f"{OUTER}\n")
    if install:
        command = [sys.executable, "-m", "uv", "pip", "install", "--python", folder / "bin" / "python", "--offline"]
        subprocess.run([*command, "--no-cache", "--no-deps", "--no-build-isolation", *install], check=True)
    return site


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("wheel"), str(ROOT))


@pytest.fixture(scope="module")
def editable(tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("editable"), "--editable", str(ROOT))


def run(site: Path, code: str, cwd: str = "/") -> str:
    """What `code` prints in the environment of `site`, started in `cwd`."""
    python = site.parents[2] / "bin" / "python"
    return subprocess.run([python, "-c", code], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def own_distribution(site: Path) -> Distribution:
    (own,) = distributions(name="torchtitan-rl-unified", path=[str(site)])
    return own


def test_the_torchtitan_wheel_has_folders_of_these_names():
    for name in ("unified", "vllm_compat"):
        assert (OUTER / "torchtitan" / "experiments" / "rl" / name / "__init__.py").exists()


def test_editable_install_is_found_from_the_others_folder(editable):
    found = [str(SOURCE / "unified" / "__init__.py"), None]
    assert json.loads(run(editable, FIND, cwd=str(OUTER))) == found


def test_wheel_install_is_found_from_the_checkout(wheel):
    found = [str(wheel / "torchtitan-rl-unified" / "unified" / "__init__.py"), None]
    assert json.loads(run(wheel, FIND, cwd=str(ROOT))) == found


def test_wheel_holds_every_file_and_none_of_torchtitans(wheel):
    names = {file for file in own_distribution(wheel).files if "__pycache__" not in file.parts}
    assert {file.parts[0] for file in names} == {
        "torchtitan-rl-unified",
        "torchtitan_rl_unified.pth",
        "torchtitan_rl_unified-0.1.0.dist-info",
    }
    sources = {
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*")
        if file.is_file() and file.suffix != ".pth" and "__pycache__" not in file.parts
    }
    assert any(name.endswith(".toml") for name in sources)
    assert sources == {"/".join(file.parts[1:]) for file in names if file.parts[0] == "torchtitan-rl-unified"}


def test_vllm_finds_the_plugin_in_both(wheel, editable):
    for site in (wheel, editable):
        (plugin,) = own_distribution(site).entry_points.select(group="vllm.general_plugins")
        assert plugin.value == "torchtitan.experiments.rl.unified.generator.plugin:register"


def test_starting_python_imports_the_hook_alone(bare, wheel, editable):
    loaded = "import sys; print(*sys.modules)"
    before = set(run(bare, loaded).split())
    for site in (wheel, editable):
        assert set(run(site, loaded).split()) - before == {"torchtitan_rl_unified_hook"}


def test_a_second_install_of_the_finder_changes_nothing(wheel):
    code = """
import sys, torchtitan_rl_unified_hook as hook
before = list(sys.meta_path)
hook.install()
print(sys.meta_path == before)
"""
    assert run(wheel, code) == "True\n"


def test_another_torchtitan_in_front_is_refused_in_one_line(tmp_path):
    """Without a finder it would be used, and nothing would say so."""
    package = tmp_path / "torchtitan" / "experiments"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    unified = SOURCE / "unified"
    commands = {
        "ImportError: ": ["-c", "import torchtitan.experiments.rl.unified"],
        "error: ": [str(unified / "infer.py")],
        "error: PYTHONPATH": [str(unified / "simple_rl_multiprocess.py"), "--dry_run"],
    }
    for start, command in commands.items():
        done = subprocess.run(
            [sys.executable, *command], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
        )
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and lines[-1].startswith(start), done.stderr
        assert f"puts {tmp_path}/torchtitan in front of " in lines[-1]
        assert len(lines) == 1 or command[0] == "-c"
