# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A checkpoint's files and tensors: all ways to store one model load to the same bits, all else is one error."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file, save_file
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.families.files import load_tensors, read_checkpoint
from torchtitan.experiments.rl.unified.families.tensors import check_finite, ListedReader, match

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import assert_same, edit, our_logits, transformers_logits, write  # noqa: E402

INDEX = "model.safetensors.index.json"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 1234\n"


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """config.json and model.safetensors of a model with an output projection of its own."""
    return write(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


@pytest.fixture
def model(untied, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(untied, tmp_path / "model"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shard(folder: Path, parts: int = 3) -> None:
    """Spreads the weights over files with an index, as transformers does."""
    tensors = sorted(weights(folder).items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(parts):
        name = f"model-{number + 1:05}-of-{parts:05}.safetensors"
        save_file(dict(tensors[number::parts]), folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys((key for key, _ in tensors[number::parts]), name)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: dict) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def rename(folder: Path, new_name, **more: torch.Tensor) -> None:
    """Saves the weights under new names, and more beside them."""
    save_file({new_name(name): each for name, each in weights(folder).items()} | more, folder / "model.safetensors")


def titan_state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in TorchTitan's names."""
    policy = model_of_checkpoint(str(folder))
    return policy.train_spec().state_dict_adapter(policy.args, None).from_hf(weights(folder))


def test_every_way_to_store_a_model_loads_to_the_same_bits(model, tmp_path):
    expected = our_logits(model)
    assert_same(model)
    assert read_checkpoint(model).kind == "hf"
    titan, dcp = tmp_path / "titan", tmp_path / "step-3"
    titan.mkdir()
    state = titan_state(model)
    save_file(state, titan / "weights.safetensors")
    torch_dcp.save(
        {**state, "train_state": {"step": 3}, "optimizer.state.norm.weight.exp_avg": torch.ones(64)},
        checkpoint_id=dcp,
        no_dist=True,
    )
    assert torch.equal(our_logits(model, weights=titan), expected) and read_checkpoint(titan).kind == "titan"
    assert torch.equal(our_logits(model, weights=dcp), expected) and read_checkpoint(dcp).kind == "dcp"
    assert read_checkpoint(dcp).tensors.keys() == state.keys()
    shard(model)
    assert torch.equal(our_logits(model), expected)
    assert len(read_checkpoint(model).files) == 3


def test_the_index_wins_over_files_that_it_does_not_name(model):
    expected = our_logits(model)
    stale = {name: torch.zeros_like(each) for name, each in weights(model).items()}
    shard(model)
    save_file(stale, model / "model.safetensors")
    save_file(stale, model / "consolidated.safetensors")
    assert torch.equal(our_logits(model), expected)
    assert [file.name for file in read_checkpoint(model).files] == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]


def test_any_sharding_of_the_trainer_reads_the_listed_tensors_alone(model):
    """torchtitan's own reader takes every file of the directory."""
    whole = weights(model)
    shard(model)
    save_file({"norm.weight": torch.zeros(64)}, model / "old.safetensors")
    checkpoint = read_checkpoint(model)
    state = {"here": torch.zeros(96, 64), "model.norm.weight": torch.zeros(64)}
    names = {"here": "lm_head.weight", "model.norm.weight": "model.norm.weight"}
    torch_dcp.load(state, storage_reader=ListedReader(checkpoint, names), no_dist=True)
    assert torch.equal(state["here"], whole["lm_head.weight"])
    assert torch.equal(state["model.norm.weight"], whole["model.norm.weight"])


def test_a_tied_model_may_store_either_name_or_both_if_they_are_equal(tied, tmp_path):
    expected = our_logits(tied)
    assert_same(tied)
    model = Path(shutil.copytree(tied, tmp_path / "model"))
    embedding = weights(tied)["model.embed_tokens.weight"]
    rename(model, lambda name: name.replace("model.embed_tokens.weight", "lm_head.weight"))
    assert "model.embed_tokens.weight" not in weights(model)
    assert torch.equal(our_logits(model), expected)
    rename(model, lambda name: name, **{"model.embed_tokens.weight": embedding.clone()})
    assert torch.equal(our_logits(model), expected)
    rename(model, lambda name: name, **{"lm_head.weight": embedding + 1})
    with pytest.raises(
        ValueError, match="model.embed_tokens.weight and lm_head.weight, and they differ, but config.json"
    ):
        our_logits(model)


def test_rotary_buffers_of_older_checkpoints_are_passed_over(model):
    expected = our_logits(model)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    rename(model, lambda name: name, **buffers)
    assert torch.equal(our_logits(model), expected)


def cut(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def only(folder: Path, name: str, content: bytes = b"\x80\x02}") -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)


def sharded(change):
    def damage(folder: Path) -> None:
        shard(folder)
        change(folder)

    return damage


def poison(value: float):
    def damage(folder: Path) -> None:
        state = weights(folder)
        state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(state, folder / "model.safetensors")

    return damage


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]


def same(name: str) -> str:
    return name


def make(kind, path: Path) -> None:
    """Puts something else in a file's place."""
    path.unlink()
    kind(path)


REFUSED = {
    "nothing there": (lambda folder: shutil.rmtree(folder), "no checkpoint directory"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "is a file: name the directory"),
    "empty": (lambda folder: (folder / "model.safetensors").unlink(), "is no checkpoint: there are no *.safetensors"),
    "pipe": (lambda folder: make(os.mkfifo, folder / "model.safetensors"), "is a pipe, a socket or a device"),
    "pipe beside": (lambda folder: os.mkfifo(folder / "notes.txt"), "notes.txt is a pipe, a socket or a device"),
    "directory": (lambda folder: make(os.mkdir, folder / "model.safetensors"), "is a directory, and its name is that"),
    "dead link": (
        lambda folder: make(lambda path: os.symlink("../blobs/x", path), folder / "model.safetensors"),
        "model.safetensors is a link to ../blobs/x, and nothing is there",
    ),
    "two files": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model_old.safetensors"),
        f"holds 2 files of weights and no {INDEX} that says which count: model.safetensors, model_old.safetensors",
    ),
    "bin": (lambda folder: only(folder, "pytorch_model.bin"), "no *.safetensors, only pytorch_model.bin: convert them"),
    "pt": (lambda folder: only(folder, "model.pt"), "no *.safetensors, only model.pt: convert them"),
    "adapter beside": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "adapter instead": (
        lambda folder: (only(folder, "adapter_model.safetensors"), (folder / "adapter_config.json").write_text("{}")),
        "holds an adapter (adapter_config.json): merge it",
    ),
    "adapter's tensors": (
        lambda folder: rename(folder, same, **{"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}),
        "holds an adapter (model.layers.0.self_attn.q_proj.lora_A.weight)",
    ),
    "LFS weights": (lambda folder: (folder / "model.safetensors").write_text(LFS), "is a Git LFS pointer"),
    "LFS tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(LFS),
        "tokenizer.json is a Git LFS pointer",
    ),
    "cut data": (lambda folder: cut(folder, 20000), "(20000 bytes) is no whole safetensors file"),
    "cut header": (lambda folder: cut(folder, 100), "(100 bytes) is no whole safetensors file"),
    "empty file": (lambda folder: cut(folder, 0), "(0 bytes) is no whole safetensors file"),
    "more bytes": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b"0"),
        "is no whole safetensors file",
    ),
    "hf_quant_config": (lambda folder: (folder / "hf_quant_config.json").write_text("{}"), "is quantised (hf_quant"),
    "scales": (
        lambda folder: rename(folder, same, **{"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}),
        "is quantised (it holds model.layers.0.mlp.up_proj.weight_scale): take the unquantised checkpoint",
    ),
    "eight bits": (
        lambda folder: rename(folder, same, **{"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
        "stores model.norm.weight in a format that is not one of float32, bfloat16, float16",
    ),
    "compiled": (lambda folder: rename(folder, lambda n: f"_orig_mod.{n}"), "a prefix '_orig_mod.': torch.compile put"),
    "DDP": (
        lambda folder: rename(folder, lambda n: f"module.{n}"),
        "a prefix 'module.': DistributedDataParallel put it",
    ),
    "base model": (lambda folder: rename(folder, lambda n: n.removeprefix("model.")), "without `model.` in front"),
    "value head": (
        lambda folder: rename(folder, same, **{"v_head.summary.weight": torch.ones(1, 64)}),
        "it holds v_head.summary.weight, which the model has not",
    ),
    "score": (
        lambda folder: rename(folder, lambda name: name.replace("lm_head", "score")),
        "it lacks lm_head.weight; it holds score.weight, which the model has not",
    ),
    "shapes": (
        lambda folder: rename(folder, same, **{"model.norm.weight": torch.ones(32)}),
        "it holds model.norm.weight [32] where [64] is expected",
    ),
    "tied by mistake": (lambda folder: edit(folder, tie_word_embeddings=True), "lm_head.weight, and they differ"),
    "fewer layers": (
        lambda folder: edit(folder, num_hidden_layers=1, layer_types=["full_attention"]),
        "it holds model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight and 8 more, which the model has not",
    ),
    "nan": (poison(float("nan")), "model.layers.1.mlp.up_proj.weight holds NaN or infinite values"),
    "inf": (poison(float("-inf")), "model.layers.1.mlp.up_proj.weight holds NaN or infinite values"),
    "absent shard": (
        sharded(lambda folder: (folder / "model-00002-of-00003.safetensors").unlink()),
        "names model-00002-of-00003.safetensors, and there is no such file: is the download complete?",
    ),
    "cut shard": (
        sharded(lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(b"\x08" + bytes(20))),
        "model-00002-of-00003.safetensors (21 bytes) is no whole safetensors file",
    ),
    "swapped": (
        sharded(
            lambda folder: write_index(
                folder, index_of(folder) | {"lm_head.weight": "model-00002-of-00003.safetensors"}
            )
        ),
        "does not fit its files: lm_head.weight is not in model-00002-of-00003.safetensors",
    ),
    "not in the index": (
        sharded(
            lambda folder: write_index(folder, {k: v for k, v in index_of(folder).items() if k != "lm_head.weight"})
        ),
        "lm_head.weight is in model-00001-of-00003.safetensors and not there by the index",
    ),
    "elsewhere": (
        sharded(lambda folder: write_index(folder, dict.fromkeys(index_of(folder), "../model.safetensors"))),
        "lies in '../model.safetensors', which is no *.safetensors beside it",
    ),
    "index of nothing": (sharded(lambda folder: write_index(folder, {})), "names no tensor"),
    "no index": (sharded(lambda folder: (folder / INDEX).write_text("{}")), "it has no weight_map"),
    "index cut": (sharded(lambda folder: (folder / INDEX).write_text("{")), f"{INDEX} is not JSON: "),
    "index of null": (sharded(lambda folder: (folder / INDEX).write_text("null")), f"{INDEX} is no JSON object"),
    "index lost": (sharded(lambda folder: (folder / INDEX).unlink()), f"holds 3 files of weights and no {INDEX}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_model_is_one_error(model, case):
    damage, complaint = REFUSED[case]
    expected = transformers_logits(model)
    damage(model)
    with pytest.raises(ValueError) as raised:
        our_logits(model)
    assert complaint in str(raised.value) or (
        case in ("nothing there", "a file") and "config.json" in str(raised.value)
    )
    assert "\n" not in str(raised.value) and expected.isfinite().all()


@pytest.mark.parametrize("case", ["nothing there", "a file"])
def test_what_is_no_directory_is_one_error(model, case):
    damage, complaint = REFUSED[case]
    damage(model)
    with pytest.raises(ValueError, match=complaint):
        read_checkpoint(model)


def test_a_model_of_a_hub_is_said_to_be_downloaded_first():
    with pytest.raises(ValueError, match="--repo_id Qwen/Qwen3-0.6B --local_dir assets/hf --all"):
        read_checkpoint("Qwen/Qwen3-0.6B")


def test_a_damaged_dcp_checkpoint_is_one_error(model, tmp_path):
    path = tmp_path / "step-3"
    torch_dcp.save(titan_state(model), checkpoint_id=path, no_dist=True)
    file = path / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="cannot be read: the data of an entry are damaged"):
        dict(load_tensors(read_checkpoint(path)))
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="step-3 is not whole: __0_0.distcp is truncated"):
        read_checkpoint(path)
    file.write_bytes(whole)
    shutil.copy(model / "model.safetensors", path)
    with pytest.raises(ValueError, match="holds both a DCP checkpoint"):
        read_checkpoint(path)


def test_finite_is_every_value():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
        check_finite("w", tensor)
        for value in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(ValueError, match="w holds NaN"):
                check_finite("w", tensor.index_fill(1, torch.tensor(4), value))
    check_finite("none", torch.empty(0))


def test_match_maps_the_models_names(untied):
    checkpoint = read_checkpoint(untied)
    expected = {name: each.shape for name, each in checkpoint.tensors.items()}
    assert match(checkpoint, expected) == {name: name for name in expected}


# Each takes (folder, rng) and changes one thing.
def drop_file(folder, rng):
    rng.choice(sorted(folder.iterdir())).unlink()


def rename_file(folder, rng):
    file = rng.choice(sorted(folder.iterdir()))
    file.rename(folder / rng.choice(["model.safetensors", "x.safetensors", "config.json", "pytorch_model.bin", INDEX]))


def cut_file(folder, rng):
    file = rng.choice(sorted(folder.iterdir()))
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def duplicate_file(folder, rng):
    file = rng.choice(sorted(folder.iterdir()))
    content = file.read_bytes()
    (folder / rng.choice([f"copy_{file.name}", "model.safetensors", "zzz.safetensors", INDEX])).write_bytes(content)


def flip_bit(folder, rng):
    """In a header, an index or config.json: a flipped bit of a weight is another weight."""
    file = rng.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
    content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def change_field(folder, rng):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    name = rng.choice(sorted(config))
    values = [0, 1, -1, 2, 7, 64, 96, 1e30, None, True, False, "", "x", [], {}, [1], {"a": 1}, 0.5]
    edit(folder, **{name: rng.choice(values)})


def drop_field(folder, rng):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config[rng.choice(sorted(config))]
    file.write_text(json.dumps(config), encoding="utf-8")


def change_tensor(folder, rng):
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    state = load_file(file)
    name = rng.choice(sorted(state))
    tensor = state.pop(name)
    change = rng.choice(["drop", "rename", "transpose", "nan", "dtype", "twice"])
    if change == "rename":
        state[rng.choice([f"_orig_mod.{name}", name.removeprefix("model."), name + "_scale", "x." + name])] = tensor
    elif change == "transpose":
        state[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[:-1].clone()
    elif change == "nan":
        state[name] = tensor.flatten().index_fill(0, torch.tensor(0), float("nan")).view(tensor.shape)
    elif change == "dtype":
        state[name] = tensor.to(rng.choice([torch.bfloat16, torch.int8, torch.float64, torch.float8_e4m3fn]))
    elif change == "twice":
        state |= {name: tensor, name.replace("layers.1", "layers.2") + "x": tensor.clone()}
    save_file(state, file, {"format": "pt"})


MUTATIONS = [drop_file, rename_file, cut_file, duplicate_file, flip_bit, change_field, drop_field, change_tensor]


def test_300_mutated_checkpoints_load_as_transformers_does_or_are_one_error(untied, tmp_path):
    """Never a traceback, never another model than the files say."""
    sharded_model = Path(shutil.copytree(untied, tmp_path / "sharded"))
    shard(sharded_model, parts=2)
    accepted = refused = 0
    for number in range(300):
        rng = random.Random(number)
        folder = tmp_path / "mutated"
        shutil.copytree(sharded_model if number % 2 else untied, folder)
        mutation = MUTATIONS[number // 2 % len(MUTATIONS)]
        mutation(folder, rng)
        try:
            ours = our_logits(folder)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, (number, mutation, str(error))
            refused += 1
        else:
            if not (folder / INDEX).exists() or (folder / "model.safetensors").exists():
                # transformers takes model.safetensors before an index: have it read what the index says.
                alone = folder / "model.safetensors"
                if (folder / INDEX).exists() and alone.exists():
                    alone.unlink()
                for file in folder.glob("*.safetensors"):
                    if not (folder / INDEX).exists():
                        file.rename(alone)
            reference = transformers_logits(folder)
            assert torch.allclose(ours, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max())), (
                number,
                mutation,
            )
            accepted += 1
        shutil.rmtree(folder)
    assert accepted + refused == 300 and 10 < accepted < 150
