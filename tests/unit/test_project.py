"""The house: what lies at the top level, which file may import which, and that every shipped setting loads."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import engine
from engine.config import GKDConfig, config_from_dict
from engine.zero.settings import (
    DEFAULT_DEEPSPEED,
    DEFAULT_TEACHER,
    fill_bucket_sizes,
    resolve_deepspeed,
    teacher_settings,
)
from tests.library.paths import ROOT
from tests.library.settings import load_in_deepspeed

DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
TOP_LEVEL = {"pyproject.toml", "engine", "ds_configs", "launch", "tests", "README.md"}
DOTFILES = {".ci", ".gitignore", ".pre-commit-config.yaml"}

# Absolute paths that tracked files may name, with all below them. Anything else would be a machine's own.
ALLOWED_PATHS = (
    "/bin/sh", "/usr/bin/env", "/usr/bin/ssh", "/usr/sbin", "/sbin",  # programs where every Linux has them
    "/dev", "/proc", "/sys", "/run", "/etc/hosts",  # the kernel's own, and what tests of several hosts mount over
    "/engine", "/runs",  # inside the container of launch/k8s.yaml
    "/local_nvme", "/path/to",  # stand-ins that the reader replaces
)  # fmt: skip

# The rooms of engine/, each line above those that it may import; a file at the top of engine/ is a room of its own.
ROOMS = (
    {"values", "paths", "errors"},
    {"config"},
    {"zero"},
    {"cluster", "plan"},
    {"data"},
    {"loss"},
    {"checkpoint"},
    {"models"},
    {"tracking"},
    {"teacher", "rollout", "publish"},
    {"evaluation", "check", "inputs"},
    {"assembly"},
    {"best", "callbacks", "publication", "accelerator"},
    {"scripting"},
    {"loop"},
    {"trainer"},
    {"__init__", "bench"},
    {"cli"},
    {"__main__"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is tracked is known in a git checkout alone")


def own_files() -> list[Path]:
    """Files that are tracked or would be, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    return [Path(path) for path in listed.stdout.split("\0") if path and (ROOT / path).exists()]


@in_git
def test_top_level_holds_nothing_else():
    assert {path.parts[0] for path in own_files()} == TOP_LEVEL | DOTFILES


def outside_paths(path: Path, text: str) -> list[str]:
    """What a file at `path`, relative to the root, names that lies outside the repository."""
    absolute = re.findall(r"(?<![\w.$}/>)\]~*\\<\[-])/[A-Za-z][\w.-]*(?:/[\w.-]+)*", text)
    found = [name for name in absolute if not any(f"{name}/".startswith(f"{good}/") for good in ALLOWED_PATHS)]
    depth = len(path.parts) - 1  # folders between the file and the root
    found += [up for up in re.findall(r"(?:\.\./)+|(?:/\.\.)+", text) if up.count("..") > depth]
    found += [
        f"parents[{n}]" for n in re.findall(r"__file__\)(?:\.\w+\(\))*\.parents\[(\d+)\]", text) if int(n) > depth
    ]
    return found + re.findall(r"\bROOT\.parent\w*", text) + re.findall(r"(?<![\w/.-])shared/\w+", text)


@in_git
def test_nothing_names_a_path_outside_the_repository():
    found = {str(path): outside_paths(path, (ROOT / path).read_text(errors="replace")) for path in own_files()}
    assert {name: paths for name, paths in found.items() if paths} == {}


def test_a_path_outside_is_found():
    slash, up = "/", ".." + "/"
    for text in (f"open('{slash}work/x')", f"{slash}root/.cache", f"cd {up}{up}", f"{slash}tmp/x", "ROOT" + ".parent"):
        assert outside_paths(Path("tests/x.py"), text), text
    assert outside_paths(Path("tests/x.py"), "Path(__file__).resolve()" + ".parents[2]")
    for text in ("#!/usr/bin/env bash", "a/b/c", "https://host/a", "</think>", f"cd {up}", "Path(__file__).parents[1]"):
        assert not outside_paths(Path("tests/x.py"), text), text


def test_ci_runs_the_suite_in_a_clone_that_stands_alone(tmp_path):
    """What is committed, nothing beside it; the status and the words of the suite; nothing left behind."""
    checkout, temporary = tmp_path / "around" / "checkout", tmp_path / "temporary"
    for folder in (checkout / ".ci", checkout / "launch", temporary):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci")
    (checkout / "launch" / "test.sh").write_text('echo "words: $*"; cd "$(dirname "$0")/.."; pwd; ls -A . ..; exit 3\n')
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["checkout", "-q", "--detach"]):
        subprocess.run([*git, *words], check=True)
    (checkout / "uncommitted").touch()
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary)}
    command = ["bash", str(checkout / ".ci" / "run"), "-k", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 3 and lines[0] == "words: -k x", done.stderr
    assert lines[1].startswith(str(temporary)) and lines[2:] == [
        ".:", ".ci", ".git", "launch", "", "..:", "gkd-engine"
    ]  # fmt: skip
    assert list(temporary.iterdir()) == []


FILES = sorted((ROOT / "engine").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_downward_only(path):
    room = module_of(path).split(".")[0]
    assert room in LEVEL_OF, f"engine/{room} is no room: add it to ROOMS"
    for target in {module.split(".")[0] for module in imported_modules(path)} - {room}:
        assert LEVEL_OF[target] < LEVEL_OF[room], f"{path} (level {LEVEL_OF[room]}) imports engine.{target}"


@pytest.mark.parametrize("room", sorted({path.parent.name for path in FILES} - {"engine"}))
def test_inside_a_room_no_import_runs_in_a_circle(room):
    files = {module_of(path): path for path in FILES if path.parent.name == room}
    imports = {name: imported_modules(path) & files.keys() - {name} for name, path in files.items()}
    while imports:
        free = [name for name, targets in imports.items() if not targets & imports.keys()]
        assert free, f"these import each other: {sorted(imports)}"
        for name in free:
            del imports[name]


@pytest.mark.parametrize("room", sorted({path.parent.name for path in FILES} - {"engine"}))
def test_a_room_says_what_it_is_for(room):
    text = ast.get_docstring(ast.parse((ROOT / "engine" / room / "__init__.py").read_text()))
    assert text is not None and len(text) > 40


def test_zeros_door_opens_nothing():
    tree = ast.parse((ROOT / "engine" / "zero" / "__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Expr]  # its docstring


def module_of(path: Path) -> str:
    """`loss.head` of engine/loss/head.py, `loss` of its __init__.py."""
    parts = path.relative_to(ROOT / "engine").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """The modules of engine/ that a file imports, at its top or inside a function, as `module_of` names them."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import from `engine`, not relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    known = {module_of(file) for file in FILES}
    found = set()
    for parts in (name.split(".")[1:] for name in names if name.split(".")[0] == "engine"):
        # `from engine import GKDConfig` names no file: it imports engine/__init__.py
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        found.add(next((prefix for prefix in prefixes if prefix in known), "__init__"))
    return found


def anchor(heading: str) -> str:
    """GitHub's id of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(path: Path, text: str) -> list[str]:
    """Links of a Markdown text at `path` that lead to no file, or to no heading of it."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"https?://", target):
            continue
        name, _, fragment = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if fragment and file.is_file() else []
        if not file.exists() or (fragment and fragment not in map(anchor, headings)):
            found.append(target)
    return found


FOLDERS_WITH_PAGES = ("engine", "launch", "tests")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS_WITH_PAGES for page in (ROOT / folder).rglob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken_links(path, path.read_text()) == []


def test_a_link_to_nowhere_is_found():
    for target in ("no.md", "engine/no.md", "README.md#no-such-heading", "#no-such-heading"):
        assert broken_links(ROOT / "README.md", f"[x]({target})") == [target]
    assert broken_links(ROOT / "README.md", "[x](engine/README.md#rooms) [y](https://host/a)") == []


def test_every_page_is_reached_from_the_first():
    text = (ROOT / "README.md").read_text()
    pages = {str(page.relative_to(ROOT)) for page in PAGES[1:] if page.name != "trl_example.md"}
    assert {page for page in pages if f"]({page})" not in text} == set()


def foreign_imports(text: str) -> set[str]:
    """The modules of tests/ that a file imports outside tests/library, by any way of writing it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.startswith((".", "tests.")) and not name.startswith("tests.library.")}
    return found


def test_tests_share_the_library_and_nothing_else():
    files = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    assert {str(path): names for path, text in files.items() if (names := foreign_imports(text))} == {}
    for text in ("from tests.unit.test_x import y", "import tests.unit", "from tests import unit", "from . import x"):
        assert foreign_imports(text), text


def test_config_imports_without_torch():
    code = (
        "import sys, engine, engine.config; assert engine.__version__; "
        "print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_a_package_has_one_version_a_licence_and_types():
    from setuptools.config.pyprojecttoml import read_configuration

    read = read_configuration(ROOT / "pyproject.toml")
    assert read["project"]["version"] == engine.__version__
    (licence,) = read["project"]["license-files"]
    assert "Apache License" in (ROOT / licence).read_text() and read["project"]["license"] == "Apache-2.0"
    for name in read["tool"]["setuptools"]["package-data"]["engine"]:
        assert (ROOT / "engine" / name).is_file()


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
