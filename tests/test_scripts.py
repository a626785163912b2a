# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The set-up scripts' errors, the constraints they install from, and the download of checkpoints."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread

import pytest
import tomli
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
DOWNLOAD = ROOT / "scripts" / "download_hf_assets.py"
PACKAGE = ROOT / "torchtitan/experiments/rl/unified"
DROPPED = {"torchvision", "torchaudio", "torchcodec"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """Package name -> version, as the constraints give them for this Python."""
    lines = (ROOT / "scripts" / "constraints-cpu.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*,]+", str(requirement.specifier)) for requirement in requirements)
    return {
        canonical(requirement.name): str(requirement.specifier)[2:]
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def test_constraints_hold_what_pyproject_asks_for():
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    versions = locked()
    for text in project["dependencies"] + extras["cpu"] + extras["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonical(requirement.name)]), text


def test_constraints_are_closed():
    versions = locked()
    for name in versions:
        for text in requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed = canonical(requirement.name)
            if needed not in DROPPED:
                version = versions.get(needed)
                assert version and requirement.specifier.contains(version, prereleases=True), f"{name} needs {text}"


@pytest.fixture
def clone(tmp_path) -> Path:
    """What set-up reads of this project, elsewhere, with no environment."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    hook = "torchtitan/experiments/rl/_import_hook"
    shutil.copytree(ROOT / hook, root / hook)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def set_up(root: Path, **variables: str) -> subprocess.Popen:
    """Starts set-up for `root` from another directory, with no package index to reach."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHON": sys.executable, **variables}
    command = ["bash", str(root / "scripts" / "setup_env.sh")]
    return subprocess.Popen(command, cwd="/", env=environment, stderr=subprocess.PIPE, text=True)


def test_set_up_names_what_the_machine_lacks(clone, tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\ntest $1 = -V && echo Python 3.9.1\n")
    old.chmod(0o755)
    for variables, message in [
        ({"PYTHON": "/nowhere/python3"}, "there is no '/nowhere/python3'"),
        ({"PYTHON": str(old)}, f"needs Python 3.11 or 3.12, but '{old}' is Python 3.9.1"),
        ({"CXX": "/nowhere/g++"}, "'/nowhere/g++' does not compile C++"),
    ]:
        process = set_up(clone, **variables)
        (line,) = process.communicate()[1].splitlines()
        assert process.returncode == 1 and line.startswith(f"set-up: {message}")
        assert not (clone / ".venv").exists()


def test_set_ups_take_turns_and_a_broken_one_is_made_again(clone):
    half_made = clone / ".venv" / "lib" / "half-made"
    half_made.mkdir(parents=True)
    with open(clone / ".venv.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        process = set_up(clone)
        assert process.stderr.readline() == f"set-up: waiting for another set-up of {clone}\n"
        assert process.poll() is None and half_made.exists()
        fcntl.flock(log, fcntl.LOCK_UN)
        lines = process.communicate()[1].splitlines()
    assert lines[0].startswith(f"set-up: making {clone}/.venv")
    assert not half_made.exists()

    # With no index to fetch from, this one breaks as well.
    assert process.returncode == 1
    assert lines[-1] == f"set-up: failed while fetching uv. The whole log: {clone}/.venv.log"
    assert "No matching distribution found for uv" in (clone / ".venv.log").read_text()
    assert not (clone / ".venv" / "setup-stamp").exists()


def test_an_environment_stays_until_another_stands_in_its_place(clone, tmp_path):
    """Proves that no set-up without a network loses one, by whatever path, and that a symlink is no other path."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "precious").touch()
    (clone / ".venv" / "setup-stamp").write_text("/elsewhere\nof old\n")
    process = set_up(clone)
    process.communicate()
    assert process.returncode == 1 and (clone / ".venv" / "precious").exists() and not (clone / ".venv.old").exists()
    assert (clone / ".venv" / "setup-stamp").read_text() == "/elsewhere\nof old\n"

    (tmp_path / "link").symlink_to(clone)
    assert set_up(tmp_path / "link").communicate()[1].startswith(f"set-up: making {clone}/.venv")


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="this is not the environment that set-up made")
def test_second_set_up_is_quiet_and_quick():
    start = time.monotonic()
    process = set_up(ROOT)
    assert process.communicate()[1] == "" and process.returncode == 0
    assert time.monotonic() - start < 2


NAMES = [
    ".gitattributes",
    "README.md",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "onnx/config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def select_files():
    spec = spec_from_file_location("download_hf_assets", DOWNLOAD)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.select_files


def test_all_assets_with_config_last(select_files):
    assert select_files(NAMES, ["config", "index", "tokenizer", "safetensors"]) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "generation_config.json",
        "config.json",
    ]


def test_one_asset(select_files):
    assert select_files(NAMES, ["config"]) == ["generation_config.json", "config.json"]
    assert select_files(["model.safetensors"], ["safetensors", "index"]) == ["model.safetensors"]


def test_an_asset_that_is_not_there(select_files):
    with pytest.raises(
        ValueError, match=r"no safetensors \(\*\.safetensors\) among its files: config\.json, model\.bin"
    ):
        select_files(["model.bin", "config.json"], ["safetensors"])


GSM8K = {
    "README.md": b"---\nconfigs:\n- config_name: main\n  data_files:\n"
    b"  - {split: train, path: main/train-*}\n  - {split: test, path: main/test-*}\n---\n",
    "main/train-0.jsonl": b'{"question": "What is 1 plus 1?", "answer": "#### 2"}\n' * 3,
    "main/test-0.jsonl": b'{"question": "What is 1 plus 2?", "answer": "#### 3"}\n',
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as downloads speak to, over HTTP: some models, one that is gated, and a data set.

    Args:
        broken: names that are listed but not there.
    """

    models = {
        "org/model": {name: f"this is {name}".encode() for name in NAMES},
        "Qwen/Qwen3-0.6B": {file.name: file.read_bytes() for file in (ROOT / "tests/assets/qwen3_tiny").iterdir()},
    }

    def __init__(self, *args, broken: set[str]):
        self.broken = broken
        super().__init__(*args)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        commit = "c" * 40
        path = self.path.split("?")[0]
        asked = path.removeprefix("/api/models/")
        resolved, _, name = path.removeprefix("/").partition(f"/resolve/{commit}/")
        if "datasets/openai/gsm8k" in path:
            self.answer_about_gsm8k(path.removeprefix("/api"))
        elif asked in self.models:
            siblings = [{"rfilename": name} for name in self.models[asked]]
            self.answer(200, json.dumps({"id": asked, "sha": commit, "siblings": siblings}).encode())
        elif self.path.startswith("/api/models/org/refused"):
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif self.path.startswith("/api/models/org/gated"):
            self.answer(403, X_Error_Code="GatedRepo")
        elif resolved not in self.models:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif name in self.broken:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, self.models[resolved][name], ETag=f'"{name}"', X_Repo_Commit=commit)

    def answer_about_gsm8k(self, path: str) -> None:
        _, kind, place = [*path.removeprefix("/datasets/openai/gsm8k").split("/", 2), "", ""][:3]
        _, _, name = place.partition("/")
        if kind == "resolve" and name in GSM8K:
            self.answer(200, GSM8K[name], ETag=f'"{name}"', X_Repo_Commit="c" * 40)
        elif kind == "resolve":
            self.answer(404, X_Error_Code="EntryNotFound")
        elif kind == "tree":
            listed = [{"type": "file", "path": f, "size": len(GSM8K[f]), "oid": "0"} for f in GSM8K]
            listed += [{"type": "directory", "path": "main", "oid": "1"}]
            here = [entry for entry in listed if str(Path(entry["path"]).parent) == (name or ".")]
            self.answer(200, json.dumps(here).encode())
        else:
            siblings = [{"rfilename": name} for name in GSM8K]
            self.answer(200, json.dumps({"id": "openai/gsm8k", "sha": "c" * 40, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        """Not on the test's output."""


@pytest.fixture
def hub():
    broken: set[str] = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, broken=broken))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", broken
    server.shutdown()
    server.server_close()
    thread.join()


def run_download(endpoint: str, folder: Path, repo_id: str, *flags: str, offline: str = "0"):
    environment = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, DOWNLOAD, "--repo_id", repo_id, "--local_dir", folder, *(flags or ["--all"])]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_download_brings_all_or_nothing(hub, tmp_path):
    endpoint, broken = hub
    broken.add("merges.txt")
    failed = run_download(endpoint, tmp_path, "org/model")
    assert failed.returncode == 1 and "the hub did not deliver" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "model").exists() and (tmp_path / "model.incomplete").exists()

    broken.clear()
    done = run_download(endpoint, tmp_path, "org/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"org/model is in {tmp_path / 'model'}"
    files = {file.name: file.read_text() for file in (tmp_path / "model").iterdir()}
    wanted = [name for name in NAMES if "/" not in name and name not in (".gitattributes", "README.md")]
    assert files == {name: f"this is {name}" for name in wanted}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "repo_id, offline, message",
    [
        ("org/model", "1", "the hub is switched off by HF_HUB_OFFLINE"),
        ("org/none", "0", "there is no model org/none on the hub"),
        ("org/gated", "0", "org/gated is gated"),
        ("org/refused", "0", "the hub refuses the token: give one that may read org/refused with --hf_token"),
        ("a/b/c", "0", "a/b/c: Repo id must be in the form"),
    ],
)
def test_download_errors_are_one_line(hub, tmp_path, repo_id, offline, message):
    failed = run_download(hub[0], tmp_path, repo_id, offline=offline)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"download_hf_assets: {message}")
    assert list(tmp_path.iterdir()) == []


def test_download_without_a_network(tmp_path):
    failed = run_download("http://127.0.0.1:9", tmp_path, "org/model")
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith("download_hf_assets: the hub did not deliver (ConnectError")


def test_download_wants_to_know_what(tmp_path):
    failed = run_download("http://127.0.0.1:9", tmp_path, "org/model", "--assets", "weights")
    assert failed.returncode == 2 and "invalid choice: 'weights'" in failed.stderr


def readme_commands(section: str) -> list[str]:
    """The command lines of a section of the package's README, options in brackets left out."""
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"## \d+\. {section}\n.*?```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    return [re.sub(r"\[.*?\]", "", line.split("  #")[0]) for line in lines if line.strip()]


@pytest.mark.slow
def test_the_readmes_download_is_where_its_next_commands_look(hub, tmp_path):
    """Proves it by running them in order; a hub on loopback has the tiny model under the real one's name."""
    for name in ("scripts", "torchtitan"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "HF_ENDPOINT": hub[0], "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["HF_HOME"] = str(tmp_path / "cache")

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (download,) = readme_commands("Download a checkpoint")
    run(download)
    default, job = readme_commands("The RL loop")
    assert "a completion ends " in run(f"{default} --dry_run")
    # The one thing in it that a CPU has not.
    said = run(f"{job} --dry_run --weight_sync.transport shared_memory")
    assert f"qwen3 of {tmp_path}/assets/hf/Qwen3-0.6B" in said and "\nsteps                           100," in said
    environment["HF_HUB_OFFLINE"] = "1"
    _, infer = readme_commands("Inference")
    said = run(infer)
    assert "What is 7 * 8?" in said and "\nText: " in said
    for toml in (PACKAGE / "train_configs").glob("qwen3_0.6b*.toml"):
        text = toml.read_text(encoding="utf-8")
        assert download.strip() in text
        assert (tmp_path / tomli.loads(text)["model"]["hf_assets_path"] / "config.json").exists()
