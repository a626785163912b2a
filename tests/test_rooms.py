# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The rooms of the package: which may import which, who may know a GPU or a model by name, what importing changes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "torchtitan.experiments.rl.unified"
ROOT = Path(__file__).parents[1] / Path(*NAME.split("."))
BELOW = {
    "errors": "",
    "dcp": "",
    "isolation": "",
    "tokenizer": "config",
    "config": "errors",
    "messages": "config errors",
    "devices": "config errors",
    "algorithms": "config errors",
    "record": "config messages errors devices dcp",
    "weights": "config messages errors devices",
    "families": "config devices weights errors dcp",
    "rollout": "config messages errors algorithms tokenizer",
    "trainer": "config messages errors devices families algorithms weights record dcp isolation",
    "generator": "config messages errors devices families weights",
    "preflight": "config messages errors devices algorithms record weights families rollout tokenizer isolation",
    "controller": "config messages errors devices trainer generator weights rollout record isolation",
    "infer": "config devices families generator rollout tokenizer isolation",
    "simple_rl_multiprocess": "config devices errors preflight controller record rollout isolation",
}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms that a file imports from, inside functions and for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.removeprefix(f"{NAME}.").split(".")[0] for name in names if name.startswith(f"{NAME}.")}
    return found & BELOW.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_from_those_below_it(path):
    if path != ROOT / "__init__.py":
        assert imports(path) - {room(path)} <= set(BELOW[room(path)].split())


# Where torchtitan keeps its DDP and its activation checkpointing.
NAMED = {"torchtitan.models.llama3.infra.parallelize"}


def test_whether_there_is_a_gpu_is_asked_in_one_room_and_models_are_named_in_files_of_their_own():
    for path in FILES:
        code = code_of(path)
        if room(path) != "devices":
            assert "cuda.is_available" not in code and "accelerator.is_available" not in code, path
        for family in ("qwen", "llama"):
            if not path.relative_to(ROOT).match(f"families/{family}*.py"):
                words = {word for word in re.split(r"[\s'\"]+", code) if family in word.lower()}
                assert words <= NAMED, (path, words)


def code_of(path: Path) -> str:
    """Without comments and docstrings, those of attributes too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


# Longer than 300 lines, still to be cut; the list only shrinks.
LONG = {"trainer/trainer.py": 400, "rollout/datasets.py": 320}


def test_no_file_is_long():
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONG.get(str(path.relative_to(ROOT)), 300), path


def test_importing_changes_nothing():
    """In a process that has torchtitan; what needs vLLM, Monarch or a GPU imports those, which are not ours."""
    files = [path for path in FILES if path.name not in ("__main__.py", "user_process.py")]
    modules = [".".join([NAME, *path.relative_to(ROOT).with_suffix("").parts]) for path in files]
    ours = [m.removesuffix(".__init__") for m in modules if not imports_outside(ROOT, m, ("vllm", "monarch"))]
    code = f"""
import importlib, os, sys, torchtitan.train
from torchtitan.protocols import train_spec
def state():
    return dict(os.environ), list(sys.meta_path), dict(train_spec._extra_train_specs), "vllm" in sys.modules
before = state()
for name in {ours}:
    importlib.import_module(name)
    assert state() == before, name
"""
    assert len(ours) > 60
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def imports_outside(root: Path, module: str, names: tuple[str, ...]) -> bool:
    """Whether importing the module itself imports one of the libraries, or a module that does."""
    path = root.joinpath(*module.removeprefix(f"{NAME}.").split(".")).with_suffix(".py")
    top = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    found = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    found += [node.module for node in top if isinstance(node, ast.ImportFrom) and node.module]
    own = [
        name
        for name in found
        if name.startswith(NAME) and root.joinpath(*name.split(".")[5:]).with_suffix(".py").exists()
    ]
    return any(name.split(".")[0] in names for name in found) or any(imports_outside(root, name, names) for name in own)
