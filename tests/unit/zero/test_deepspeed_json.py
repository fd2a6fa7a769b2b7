"""DeepSpeed JSONs as LLaMA-Factory, ms-swift and transformers ship them, and what people write into their own."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch

from engine.checkpoint.elastic import zero_layout
from engine.config import GKDConfig, config_from_dict
from engine.zero.deepspeed_json import KEYS, REMOVED, read_json
from engine.zero.settings import replaced_scheduler, resolve_deepspeed, teacher_settings
from tests.library.paths import ROOT
from tests.library.settings import load_in_deepspeed

SHIPPED = sorted((ROOT / "tests/deepspeed_files").glob("*.json"))
STAGE3 = {"zero_optimization": {"stage": 3}}


def zero3(**keys) -> dict:
    return {"zero_optimization": {"stage": 3, **keys}}


def resolve(settings: dict | str, **fields) -> dict:
    return resolve_deepspeed(GKDConfig(deepspeed=settings, **fields), world_size=1, hidden_size=64)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_resolve_and_load(path):
    settings = resolve(str(path))
    assert '"auto"' not in json.dumps(settings) and not {"fp16", "scheduler"} & set(settings)
    loaded = load_in_deepspeed(settings)
    assert loaded.zero_config.stage == 3 and loaded.train_batch_size == 8 and loaded.bfloat16_config.enabled
    offload = loaded.zero_config.offload_optimizer
    device = offload.device if offload else "none"
    assert device == ("cpu" if "offload" in path.stem else "none")
    # Beside offload, DeepSpeed wants its own Adam.
    assert (loaded.optimizer_name == "adamw") == ("optimizer" in json.loads(path.read_text()) or device == "cpu")
    assert zero_layout(GKDConfig(deepspeed=str(path)), 1)["offload_param"] == device


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_serve_a_teacher_unless_they_train_it(path):
    config = GKDConfig(teacher_deepspeed=str(path))
    if "transformers" in path.stem:
        with pytest.raises(ValueError, match="teacher_deepspeed: remove `optimizer`"):
            teacher_settings(config)
        return
    loaded = load_in_deepspeed(teacher_settings(config))
    assert loaded.zero_config.stage == 3 and loaded.train_micro_batch_size_per_gpu == 1
    assert loaded.zero_config.offload_optimizer is None


def test_a_scheduler_without_values_gives_way_and_that_is_said():
    warmup = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_num_steps": "auto"}}
    config = GKDConfig(deepspeed=STAGE3 | {"scheduler": warmup}, lr_scheduler_type="cosine")
    assert "scheduler" not in resolve_deepspeed(config, 1)
    assert replaced_scheduler(config) == "deepspeed `scheduler` WarmupLR gives way to lr_scheduler_type=cosine"
    assert replaced_scheduler(GKDConfig()) is None


@pytest.mark.parametrize(
    "kind,given,filled",
    [
        ("Lion", {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}, "lr betas weight_decay"),
        ("lion", {"betas": (0.9, 0.999)}, "lr betas weight_decay"),
        ("SGD", {"momentum": 0.9, "betas": "auto"}, "lr weight_decay momentum"),
        ("adamw", {"torch_adam": True}, "lr betas eps weight_decay torch_adam"),
        ("Muon", {"momentum": 0.95, "muon_lr": 0.01}, "lr betas eps weight_decay momentum muon_lr"),
    ],
)
def test_optimizers_get_their_own_parameters(kind, given, filled):
    settings = resolve(STAGE3 | {"optimizer": {"type": kind, "params": given}}, learning_rate=0.5)
    params = settings["optimizer"]["params"]
    assert set(params) == set(filled.split()) and params["lr"] == 0.5 and "auto" not in params.values()
    assert settings["zero_optimization"].get("reduce_scatter", True) == (kind != "Muon")
    load_in_deepspeed(settings)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"gradient_cliping": 1.0}, "deepspeed: unknown key `gradient_cliping`; did you mean `gradient_clipping`"),
        ({"zero_optimisation": {"stage": 3}}, "unknown key `zero_optimisation`; did you mean `zero_optimization`"),
        ({"zzzz": 1}, "unknown key `zzzz`; known are activation_checkpointing, "),
        (
            zero3(stage3_prefetch_bucketsize=1),
            "`zero_optimization.stage3_prefetch_bucketsize`; did you mean `stage3_p",
        ),
        (zero3(offload_param={"devise": "cpu"}), "`zero_optimization.offload_param.devise`; did you mean `device`"),
        (STAGE3 | {"bf16": {"enable": True}}, "unknown key `bf16.enable`; did you mean `enabled`"),
        (STAGE3 | {"aio": {"blocksize": 1}}, "unknown key `aio.blocksize`; did you mean `block_size`"),
        ({"zero_optimization": True}, r"`zero_optimization`=True: must be an object"),
        (zero3(offload_optimizer="cpu"), "`zero_optimization.offload_optimizer`='cpu': must be an object"),
        (zero3(mics_shard_size=8), "`zero_optimization.mics_shard_size`=8: removed from DeepSpeed; take it out"),
        (STAGE3 | {"elasticity": {"enabled": True}}, "`elasticity`=.*: removed from DeepSpeed"),
        (zero3(cpu_offload=True), '`zero_optimization.cpu_offload`=True: write `offload_optimizer`: {"device": "cpu"}'),
        (STAGE3 | {"optimizer": {"type": "Lamb"}}, "`optimizer.type`='Lamb': must be one of AdamW, Adam, Lion, Muon"),
        (STAGE3 | {"optimizer": {"params": {}}}, "`optimizer.type`='': must be one of AdamW"),
        (
            STAGE3 | {"optimizer": {"type": "Lion", "params": {"eps": 1e-8}}},
            "`optimizer.params.eps`: Lion takes lr, betas, weight_decay",
        ),
        (
            STAGE3 | {"optimizer": {"type": "Lion", "params": {"betas": [0.9, 0.99]}}},
            "`optimizer.params.betas`=.*adam",
        ),
        (zero3(reduce_scatter=True) | {"optimizer": {"type": "Muon"}}, "reduce_scatter`=True contradicts.*type=Muon"),
        (STAGE3 | {"scheduler": {"type": "OneCycle"}}, "`scheduler.type`='OneCycle': remove `scheduler`"),
        (
            STAGE3 | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}},
            "`scheduler.params.warmup_num_steps`=9: remove `scheduler`; the field `lr_scheduler_type` sets",
        ),
        (STAGE3 | {"steps_per_print": "auto"}, '`steps_per_print`="auto": no field of the configuration gives it'),
        ('{"zero_optimization": {"stage": 2}}', "`zero_optimization.stage` must be 3"),
        ('{"zero_optimization": {"stage": 3}', "deepspeed: not valid JSON"),
        ('{"bf16": {}, "bf16": {}}', "the key `bf16` occurs twice"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve(settings)


def test_null_and_what_is_switched_off_are_not_there():
    off = zero3(offload_param=None, offload_optimizer=None, overlap_comm=None, mics_shard_size=-1, cpu_offload=False)
    off |= {"optimizer": None, "scheduler": None, "fp16": None, "elasticity": {"enabled": False}, "amp": None}
    assert read_json(off, "x") == STAGE3
    assert resolve(off) == resolve(copy.deepcopy(STAGE3))
    assert zero_layout(GKDConfig(deepspeed=off), 2)["offload_optimizer"] == "none"
    assert teacher_settings(GKDConfig(teacher_deepspeed=off))["zero_optimization"] == {"stage": 3}
    assert resolve(STAGE3 | {"bfloat16": {"enabled": "auto"}})["bf16"] == {"enabled": True}


def test_json_on_the_command_line():
    text = '{"zero_optimization": {"stage": 3, "sub_group_size": 1e8}}'
    config = config_from_dict({"deepspeed": text, "teacher_deepspeed": f" {text}"})
    assert config.deepspeed == json.loads(text)
    assert teacher_settings(config)["zero_optimization"]["sub_group_size"] == 1e8


def test_variables_in_paths_of_the_json(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/local_nvme")
    block = {"device": "nvme", "nvme_path": "${SCRATCH}/swap"}
    assert resolve(zero3(offload_optimizer=block))["zero_optimization"]["offload_optimizer"]["nvme_path"] == (
        "/local_nvme/swap"
    )
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ValueError, match="nvme_path.*the environment variable SCRATCH is not set"):
        resolve(zero3(offload_optimizer=block))


def test_deepspeeds_optimizers_take_what_is_filled_in():
    """On the device and, beside offload, on the CPU; building one would compile its kernels."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    classes = {"Lion": [FusedLion, DeepSpeedCPULion], "AdamW": [FusedAdam, DeepSpeedCPUAdam], "SGD": [torch.optim.SGD]}
    for name, of_name in classes.items():
        filled = set(resolve(STAGE3 | {"optimizer": {"type": name}})["optimizer"]["params"])
        for one in of_name:
            assert filled <= set(inspect.signature(one.__init__).parameters), one


@pytest.mark.lengthy
def test_known_keys_are_deepspeeds():
    """Each key that DeepSpeed's own configuration asks for, and the fields of its models; no more and no fewer."""
    from deepspeed.runtime import precision_config, zero
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    asked = {
        path: Asked({}) for path in KEYS if "." not in path and path not in ("", "zero_optimization", "bf16", "fp16")
    }
    asked["optimizer"]["type"] = asked["scheduler"]["type"] = "x"
    zero_block = Asked({"stage": 3})
    top = Asked({"train_batch_size": 1, "zero_optimization": zero_block, **asked})
    load_in_deepspeed(top)
    models = {
        "zero_optimization": zero.config.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
        "fp16": precision_config.DeepSpeedFP16Config,
    }
    # `autotuning` is the launcher's.
    assert KEYS[""] | REMOVED[""] == top.asked | {"autotuning"}
    assert REMOVED["zero_optimization"] == zero_block.asked
    for path, model in models.items():
        fields = model.model_fields
        assert KEYS[path] == set(fields) | {field.alias for field in fields.values() if field.alias}, path
    for path in set(asked) - set(models):
        assert asked[path].asked <= KEYS[path], path
        assert path == "optimizer" or KEYS[path] <= asked[path].asked, path


class Asked(dict):
    """A dict that notes which keys it was asked for, in its copies too."""

    def __init__(self, values: dict, asked: set | None = None) -> None:
        super().__init__(values)
        self.asked: set[str] = set() if asked is None else asked

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return Keys(self)

    def __deepcopy__(self, memo):
        return Asked({key: copy.deepcopy(value, memo) for key, value in self.items()}, self.asked)


class Keys:
    """`key in asked.keys()` is asking, too."""

    def __init__(self, values: Asked) -> None:
        self.values = values

    def __contains__(self, key):
        return key in self.values

    def __iter__(self):
        return iter(self.values)
