# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Fetch a model's files from the Hugging Face hub: tokenizer, config, weights and their index.

    python scripts/download_hf_assets.py --repo_id Qwen/Qwen3-0.6B --local_dir checkpoints --all

puts them in checkpoints/Qwen3-0.6B. They gather in checkpoints/Qwen3-0.6B.incomplete until the last one is there, so
the folder that other commands read never holds a part of a model; the same command again takes up a broken download.
"""

import argparse
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import hf_hub_download, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

# Asset -> names it has at the root of a repository. In this order files reach the folder that others read: config.json
# and the index, by which a checkpoint is recognised, come after what they speak of.
ASSETS = {
    "safetensors": ["*.safetensors"],
    "tokenizer": [
        "tokenizer*.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "chat_template.*",
    ],
    "index": ["*.safetensors.index.json"],
    "config": ["generation_config.json", "config.json"],
}
# Weights in one file need no index.
OPTIONAL = {"index"}


def select_files(names: list[str], assets: list[str]) -> list[str]:
    """The files of a repository that `assets` (keys of `ASSETS`) stand for, in the order in which they are to appear.

    Raises:
        ValueError: an asset has no file in the repository.
    """
    selected = []
    for asset, patterns in ASSETS.items():
        if asset not in assets:
            continue
        found = [name for pattern in patterns for name in sorted(names) if "/" not in name and fnmatch(name, pattern)]
        if not found and asset not in OPTIONAL:
            raise ValueError(
                f"no {asset} ({', '.join(patterns)}) among its files: {', '.join(sorted(names)) or 'none'}"
            )
        selected += found
    return selected


def download(repo_id: str, local_dir: Path, assets: list[str], token: str | None) -> Path:
    """Fetch `assets` of one commit of `repo_id` into `local_dir`/NAME, all of them or none, and return that folder."""
    info = HfApi(token=token).model_info(repo_id)
    # A commit, not a branch: a push in between must not mix two versions.
    names = select_files([file.rfilename for file in info.siblings], assets)
    folder = local_dir / repo_id.split("/")[-1]
    staging = folder.with_name(folder.name + ".incomplete")
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        hf_hub_download(repo_id, name, revision=info.sha, local_dir=staging, token=token)
    folder.mkdir(exist_ok=True)
    for name in names:
        (staging / name).replace(folder / name)
    shutil.rmtree(staging)
    return folder


def explain(error: Exception, repo_id: str) -> str:
    """What went wrong and what to do, in one line."""
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its terms on its page, then give a token of yours with --hf_token"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no model {repo_id} on the hub, or it is private (then give --hf_token)"
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is switched off by HF_HUB_OFFLINE: unset it to download"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"the hub refuses the token: give one that may read {repo_id} with --hf_token (or unset HF_TOKEN)"
    if isinstance(error, (HTTPError, LocalEntryNotFoundError)):
        return f"the hub did not deliver ({type(error).__name__}: {error}); the same command takes up where it stopped"
    return f"{repo_id}: {error}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch a model's files from the Hugging Face hub.")
    parser.add_argument("--repo_id", required=True, help="for example Qwen/Qwen3-0.6B")
    parser.add_argument(
        "--local_dir", type=Path, default=Path("checkpoints"), help="gets a folder with the model's name"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_const", dest="assets", const=list(ASSETS), help="every asset")
    which.add_argument("--assets", nargs="+", choices=list(ASSETS))
    parser.add_argument("--hf_token", help="for gated and private models")
    args = parser.parse_args(argv)
    try:
        folder = download(args.repo_id, args.local_dir, args.assets, args.hf_token)
    except (OSError, ValueError, HTTPError) as error:
        print(f"download_hf_assets: {' '.join(explain(error, args.repo_id).split())}", file=sys.stderr)
        return 1
    print(f"{args.repo_id} is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
