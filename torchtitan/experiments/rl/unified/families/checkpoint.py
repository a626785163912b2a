# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A checkpoint's config.json."""

import json
from pathlib import Path
from typing import Any


def read_config(path: str) -> dict[str, Any]:
    """The fields of `path`/config.json, RoPE's at the top: rope_theta, rope_type, rope_scaling (None: not scaled).

    Raises:
        ValueError: there is no such directory or file, or it is not a JSON object.
    """
    if not Path(path).is_dir():
        raise ValueError(f"no checkpoint directory {path} ([model] hf_assets_path): see scripts/download_hf_assets.py")
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"No checkpoint here: {file} does not exist.") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no JSON object")
    # transformers 5 keeps all of RoPE in rope_parameters, and takes what stands there first.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta"))
    config["rope_type"] = kind
    config["rope_scaling"] = None if kind == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    return config
