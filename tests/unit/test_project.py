"""The house: what lies at the top level, which file may import which, and that every shipped setting loads."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.config import GKDConfig, config_from_dict
from engine.settings import DEFAULT_DEEPSPEED, DEFAULT_TEACHER, fill_bucket_sizes, resolve_deepspeed, teacher_settings

ROOT = Path(__file__).parents[2]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
TOP_LEVEL = {"pyproject.toml", "engine", "ds_configs", "launch", "tests", "README.md"}
DOTFILES = {".ci", ".gitignore", ".pre-commit-config.yaml"}

# Modules of engine/ by level. A module may import its own level and lower ones. A folder stands for all in it.
LEVELS = {
    0: {"config", "settings", "errors"},
    1: {
        "distributed",
        "hosts",
        "logs",
        "batch",
        "order",
        "rows",
        "tokenizer",
        "vocabulary",
        "weights",
        "structure",
        "volume",
        "signals",
        "manifest",
        "timing",
        "progress",
        "kv_cache",
    },
    2: {"loss", "zero", "tracking", "chat", "backbone", "shards", "elastic"},
    3: {"data", "startup", "student", "teacher", "decoder", "objective", "performance"},
    4: {"rollout", "checkpoint", "check", "export", "evaluation", "faults"},
    5: {"trainer", "assembly"},
    6: {"cli", "__main__", "bench", "__init__"},
}
LEVEL_OF = {module: level for level, modules in LEVELS.items() for module in modules}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is tracked is known in a git checkout alone")
def test_top_level_holds_only_what_the_design_names():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    found = {path.split("/")[0] for path in listed.stdout.split("\0") if path and (ROOT / path).exists()}
    assert found == TOP_LEVEL | DOTFILES


@pytest.mark.parametrize("path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_levels_never_import_higher_ones(path):
    module = engine_module(path)
    assert module in LEVEL_OF, f"engine/{module} has no level: add it to LEVELS, and to section 8 of the design"
    for target in imported_modules(path) & set(LEVEL_OF):  # one without a level fails above, for its own file
        assert LEVEL_OF[target] <= LEVEL_OF[module], f"{path.name} (level {LEVEL_OF[module]}) imports engine.{target}"


def engine_module(path: Path) -> str:
    """The room that a file belongs to: `engine/loss/head.py` is in `loss`."""
    return path.relative_to(ROOT / "engine").with_suffix("").parts[0]


def imported_modules(path: Path) -> set[str]:
    """The rooms of engine/ that a file imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import from `engine`, not relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    inside = [name.split(".")[1:] for name in names if name.split(".")[0] == "engine"]
    # `from engine import GKDConfig` names no file: it imports engine/__init__.py.
    return {parts[0] if parts and is_room(parts[0]) else "__init__" for parts in inside}


def is_room(name: str) -> bool:
    return (ROOT / "engine" / name).is_dir() or (ROOT / "engine" / f"{name}.py").is_file()


def test_config_imports_without_torch():
    code = "import sys, engine.config; print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_zero3_json_is_the_default():
    assert json.loads((ROOT / "ds_configs/zero3.json").read_text()) == DEFAULT_DEEPSPEED
    assert json.loads((ROOT / "ds_configs/teacher_zero3.json").read_text()) == DEFAULT_TEACHER


@pytest.mark.parametrize("path", [p for p in DS_CONFIGS if not p.name.startswith("teacher")], ids=lambda p: p.name)
def test_student_settings_load_in_deepspeed(path):
    settings = resolve_deepspeed(GKDConfig(deepspeed=str(path)), world_size=1, hidden_size=64)
    assert '"auto"' not in json.dumps(settings)
    loaded = load_in_deepspeed(settings)
    assert loaded.zero_config.stage == 3 and loaded.train_batch_size == 8 and loaded.gradient_clipping == 1.0
    devices = {"zero3": ("none", "none"), "zero3_offload": ("cpu", "cpu"), "zero3_nvme": ("nvme", "cpu")}
    offloads = (loaded.zero_config.offload_optimizer, loaded.zero_config.offload_param)
    assert tuple(offload.device if offload else "none" for offload in offloads) == devices[path.stem]
    assert all(offload.pin_memory for offload in offloads if offload)
    assert path.stem != "zero3_nvme" or loaded.aio_config["queue_depth"] == 8


@pytest.mark.parametrize("path", [p for p in DS_CONFIGS if p.name.startswith("teacher")], ids=lambda p: p.name)
def test_teacher_settings_load_in_deepspeed(path):
    settings = teacher_settings(GKDConfig(teacher_deepspeed=str(path)))
    fill_bucket_sizes(settings, 64)
    assert '"auto"' not in json.dumps(settings)
    loaded = load_in_deepspeed(settings)
    assert loaded.zero_config.stage == 3 and loaded.bfloat16_config.enabled
    devices = {"teacher_zero3": "none", "teacher_zero3_cpu": "cpu", "teacher_zero3_nvme": "nvme"}
    offload = loaded.zero_config.offload_param
    assert (offload.device if offload else "none") == devices[path.stem]


def load_in_deepspeed(settings: dict):
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(settings)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_validate(path):
    config = config_from_dict(yaml.safe_load(path.read_text()), source=path.name)
    assert config.model_name_or_path and config.dataset_name


def test_constraints_pin_every_direct_dependency_within_its_bounds():
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib")  # Python 3.11

    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    pins = {Requirement(line).name: Requirement(line) for line in lines if line and not line.startswith("#")}
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    for wanted in map(Requirement, project["dependencies"] + extras):
        if wanted.name != project["name"]:
            (pin,) = pins[wanted.name].specifier
            assert wanted.specifier.contains(pin.version), f"{wanted} excludes the pinned {pin.version}"
