"""Weight files that are not what the model needs: every kind is one clear error, on every rank and in both loaders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from engine import GKDConfig
from engine.config.source import ModelSource
from engine.models.backbone import compute_dtype, download_model, load_causal_lm
from engine.models.export import export_checkpoint
from engine.models.weights import persistent_buffers
from engine.zero.settings import teacher_settings
from tests.library.families import CONFIGS
from tests.library.models import build, tiny_llama, tiny_tokenizer
from tests.library.runs import train, write_run_inputs


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit(folder: Path, change) -> None:
    """Rewrite the folder's one file with `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def without(*words: str):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(word in name for word in words)}


def write(folder: Path, change=None, to_bin: bool = False, tied: bool = False, shards: bool = False) -> Path:
    model = tiny_llama(101, tied=tied, seed=5, hidden_size=32)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    if change is not None:
        edit(folder, change)
    if to_bin:
        as_bin(folder)
    return folder


def shorten(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Folders by name, with what the error says."""
    root = tmp_path_factory.mktemp("broken")
    lost = "random numbers"
    prefixed = lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()}  # noqa: E731
    wide = lambda tensors: tensors | {"model.norm.weight": torch.ones(33)}  # noqa: E731
    other_head = lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}  # noqa: E731
    cases = {}
    for to_bin in (False, True):
        kind = "bin" if to_bin else "safetensors"
        for name, change, message in (
            ("no head", without("lm_head"), f"lack lm_head.weight; {lost}"),
            ("no layer", without("layers.1"), "lack model.layers.1.input_layernorm.weight, model.layers.1.mlp."),
            ("prefixed", prefixed, "lack lm_head.weight, model.embed_tokens.weight, model.layers.0."),
            ("wide", wide, "norm.weight"),
        ):
            message = message.replace(lost, f"these would be {lost}")
            cases[f"{name}, {kind}"] = (write(root / f"{name}_{kind}", change, to_bin), message)
    cases["tied in words only"] = (write(root / "untied", other_head, tied=True), "`tie_word_embeddings` to false")
    return cases


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    root = tmp_path_factory.mktemp("unreadable")
    cut = write(root / "cut")
    shorten(cut / "model.safetensors", 5000)
    stub = write(root / "stub")
    shorten(stub / "model.safetensors", 50)
    half = write(root / "half", to_bin=True)
    shorten(half / "pytorch_model.bin", 5000)
    shards = write(root / "shards", shards=True)
    victim = sorted(shards.glob("*.safetensors"))[1]
    victim.unlink()
    index = write(root / "index", shards=True)
    listing = json.loads((index / "model.safetensors.index.json").read_text())
    listing["weight_map"]["model.embed_tokens.weight"] = listing["weight_map"]["model.norm.weight"]
    (index / "model.safetensors.index.json").write_text(json.dumps(listing))
    empty = write(root / "empty")
    (empty / "model.safetensors").unlink()
    return {
        "cut": (cut, "model.safetensors is damaged: it has 5000 bytes instead of"),
        "stub": (stub, "is no safetensors file, or is cut short"),
        "half": (half, "pytorch_model.bin (5000 bytes) is cut short"),
        "shards": (shards, f"names {victim.name}, which the folder does not have"),
        "index": (index, "embed_tokens.weight"),
        "empty": (empty, "has no weights"),
    }


def errors(folders: dict[str, str], placement: str) -> dict[str, str]:
    """What loading each folder says, `loaded` where nothing."""
    config = GKDConfig(bf16=False)
    settings = teacher_settings(config) if placement == "zero3" else None
    results = {}
    for name, folder in folders.items():
        try:
            load_causal_lm(ModelSource(folder), compute_dtype(config), settings)
            results[name] = "loaded"
        except ValueError as error:
            results[name] = str(error)
        dist.barrier()
    return results


@pytest.mark.parametrize("placement", ["zero3", "replicated"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_incomplete_weights_are_an_error(ranks, broken, placement, world_size):
    folders = {name: str(folder) for name, (folder, _) in broken.items()}
    for results in ranks(world_size).run(errors, folders, placement):
        for name, (folder, message) in broken.items():
            if name == "tied in words only" and placement == "replicated":
                assert results[name] == "loaded"  # transformers sees both and leaves them untied
                continue
            assert message in results[name] and str(folder) in results[name], (name, results[name])
            assert "\n" not in results[name]


def test_files_that_cannot_be_read_are_named_before_anything_loads(unreadable):
    for name, (folder, message) in unreadable.items():
        with pytest.raises(ValueError) as caught:
            download_model(ModelSource(str(folder)))
        assert message in str(caught.value) and "\n" not in str(caught.value), (name, str(caught.value))


def test_complete_weights_load(ranks, tmp_path):
    """Tied ones without a head, both kinds of file, and names without the base model's prefix."""
    bare = lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()}  # noqa: E731
    both = lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}  # noqa: E731
    old = lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # noqa: E731
    folders = {
        "tied": write(tmp_path / "tied", tied=True),
        "tied bin": write(tmp_path / "tied_bin", tied=True, to_bin=True),
        "tied and both": write(tmp_path / "both", both, tied=True),
        "bare": write(tmp_path / "bare", bare),
        "old": write(tmp_path / "old", old),
        "shards": write(tmp_path / "shards", shards=True),
    }
    for folder in folders.values():
        download_model(ModelSource(str(folder)))
    for placement in ("zero3", "replicated"):
        for results in ranks(2).run(errors, {n: str(f) for n, f in folders.items()}, placement):
            assert set(results.values()) == {"loaded"}, (placement, results)


def test_buffers_of_a_checkpoint_are_read_and_written(ranks, tmp_path):
    """DeepSeek V3's router has a bias that is no parameter."""
    fields = write_run_inputs(tmp_path) | {"max_steps": 1, "save_steps": 1, "lmbda": 0.0}
    values = CONFIGS["deepseek_v3"].to_dict() | {"vocab_size": 259, "max_position_embeddings": 512}
    model = build(type(CONFIGS["deepseek_v3"]).from_dict(values))
    (key,) = persistent_buffers(model)
    persistent_buffers(model)[key].copy_(torch.tensor([3.0, -2.0, 1.0, 0.5]))
    model.save_pretrained(tmp_path / "deepseek")
    tiny_tokenizer().save_pretrained(tmp_path / "deepseek")
    ranks(2).run(train, fields | {"model_name_or_path": str(tmp_path / "deepseek")})
    export_checkpoint(tmp_path / "run" / "checkpoints" / "step_1", tmp_path / "out", None)
    for folder in (tmp_path / "run" / "final", tmp_path / "out"):
        loaded = load_causal_lm(ModelSource(str(folder)), torch.float32, None)
        assert persistent_buffers(loaded)[key].tolist() == [3.0, -2.0, 1.0, 0.5]
