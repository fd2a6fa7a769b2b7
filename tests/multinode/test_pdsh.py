"""The deepspeed launcher over pdsh and ssh on two hosts: it trains as on one, and says what is wrong with a cluster."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from tests.library.launch import free_port
from tests.library.models import tiny_llama, tiny_tokenizer
from tests.library.network import HOSTS, INTERFACE, sh
from tests.library.paths import ROOT
from tests.library.runs import train_metrics, write_run_inputs

NUM_STEPS, SAVE_STEPS = 16, 4
TIMEOUT_S = 20


def words(script: str, command: str, recipe: Path, *more: str) -> list[str]:
    return ["bash", f"launch/{script}.sh", command, str(recipe), "--timeout_s", str(TIMEOUT_S), *more]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    fields = write_run_inputs(folder) | {"max_steps": NUM_STEPS, "save_steps": SAVE_STEPS, "vocab_parallel_size": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(network, recipe) -> tuple[Path, str]:
    """A whole run on two hosts, and what it printed."""
    status, output = network.run("n1", words("multinode", "train", recipe))
    assert status == 0, output[-4000:]
    return recipe.parent / "run", output


def test_two_hosts_train_as_one(network, finished, recipe, tmp_path):
    """2 hosts x 2 ranks give the figures of 4 ranks on one host, to the last bit; one rank talks."""
    folder, output = finished
    one_host = words("local", "train", recipe, "--output_dir", str(tmp_path / "run"))
    status, local_output = network.run("n1", one_host, RANKS="4")
    assert status == 0, local_output[-4000:]
    assert len(train_metrics(folder)) == NUM_STEPS and train_metrics(folder) == train_metrics(tmp_path / "run")
    assert output.count(f"step {NUM_STEPS}/{NUM_STEPS} | loss") == 1
    assert sorted(path.name for path in (folder / "logs").iterdir()) == [f"rank_{rank}.log" for rank in range(4)]


def test_a_lost_link_ends_the_run_and_the_next_one_goes_on(network, finished, recipe, tmp_path):
    folder = tmp_path / "run"
    command = words("multinode", "train", recipe, "--output_dir", str(folder), "--resume_from_checkpoint", "auto")
    process = network.start("n1", command)
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or len(metrics.read_text().splitlines()) < SAVE_STEPS + 1:
        assert time.monotonic() < end and process.poll() is None, network.wait(process, 1)[1][-4000:]
        time.sleep(0.02)
    network.set_link("n2", "down")
    cut = time.monotonic()
    status, output = network.wait(process, deadline_s=120)
    ended_s = time.monotonic() - cut
    print(f"ended {ended_s:.1f} s after the link went down, with timeout_s={TIMEOUT_S}")
    network.restart("n2")
    network.set_link("n2", "up")
    assert status != 0 and ended_s < TIMEOUT_S + 70, ended_s
    assert "error: no answer from ranks 2, 3 on n2" in output, output[-4000:]
    assert output.count("Traceback (most recent call last)") == 1
    assert len(train_metrics(folder)) < NUM_STEPS
    status, output = network.run("n1", command)
    assert status == 0, output[-4000:]
    assert train_metrics(folder) == train_metrics(finished[0])


def test_ssh_down_names_the_host_before_anything_starts(network, recipe):
    network.stop_sshd("n2")
    try:
        started = time.monotonic()
        status, output = network.run("n1", words("multinode", "train", recipe), deadline_s=60)
        assert status == 2 and "error: no ssh to n2: nothing was started" in output
        assert time.monotonic() - started < 30
        # DeepSpeed's launcher alone starts the other hosts, whose ranks wait no longer than they are told.
        bare = ["deepspeed", "--hostfile", network.environment["HOSTFILE"], "--launcher", "pdsh", "--master_addr"]
        bare += [HOSTS["n1"], "--module", "engine", "train", "--config", str(recipe), "--timeout_s", "10"]
        status, output = network.run("n1", bare, deadline_s=60)
        assert status != 0 and "n2: ssh: connect to host n2" in output
        assert "error: ranks 2, 3 did not come within 10 s. Here are ranks 0, 1 on n1" in output
    finally:
        network.start_sshd("n2")


@pytest.mark.parametrize("command", ["check", pytest.param("train", marks=pytest.mark.slow)])
def test_a_host_that_differs_is_named(network, recipe, tmp_path, command):
    """Another transformers, other data and an unshared run folder on n2: `check` names all of it at once, `train` the
    first of it."""
    metadata = next(
        path
        for path in importlib.metadata.distribution("transformers").files
        if path.name == "METADATA" and "dist-info" in str(path)
    ).locate()
    changed, data = tmp_path / "METADATA", tmp_path / "data"
    changed.write_text(metadata.read_text().replace("\nVersion: ", "\nVersion: 4.", 1))
    shutil.copytree(recipe.parent / "data", data)
    with (data / "train.jsonl").open("a") as file:
        file.write((data / "train.jsonl").read_text().splitlines()[0] + "\n")
    run = tmp_path / "run"
    run.mkdir()
    mounts = (
        f"mount --bind {changed} {metadata} && mount --bind {data} {recipe.parent / 'data'} && "
        f"mount -t tmpfs -o size=4096 tmpfs {run}"
    )
    network.restart("n2", before=mounts)
    try:
        status, output = network.run("n1", words("multinode", command, recipe, "--output_dir", str(run)))
    finally:
        network.restart("n2")
    version = importlib.metadata.version("transformers")
    differs = f"transformers differs: {version} on ranks 0, 1 on n1, but 4.{version} on ranks 2, 3 on n2"
    assert status != 0 and "Traceback" not in output, output[-3000:]
    texts = (f"error: {differs}", "error: dataset differs: ", "is not shared", "n2 has ", "not fit to run")
    for text in texts if command == "check" else (f"error: the ranks are not alike: {differs}",):
        assert output.count(text) == 1, output[-3000:]


@pytest.mark.slow
def test_check_measures_links_under_ssh_and_a_selection(network, recipe):
    """LAUNCHER=ssh with two of the four slots; the bandwidth across hosts is measured."""
    words_ = words("multinode", "check", recipe)
    status, output = network.run("n1", words_, LAUNCHER="ssh", INCLUDE="n1:1@n2:0", MASTER_PORT=free_port())
    assert status == 0, output[-3000:]
    for text in ("2 ranks: rank 0 on n1; rank 1 on n2", "across hosts  all-reduce of", "all alike: fit to run"):
        assert text in output, output[-3000:]


@pytest.mark.slow
def test_mpi_starts_the_same_ranks(network, recipe):
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    status, output = network.run("n1", words("mpi", "check", recipe), MPI_ARGS="--oversubscribe", **root)
    assert status == 0, output[-3000:]
    assert "4 ranks: ranks 0, 1 on n1; ranks 2, 3 on n2" in output


@pytest.mark.slow
def test_an_interface_that_is_not_there_is_named(network, recipe):
    status, output = network.run("n1", words("multinode", "check", recipe), IFNAME="eth9", MASTER_ADDR=HOSTS["n1"])
    assert status != 0 and "GLOO_SOCKET_IFNAME=eth9: n1 has no such interface with an address" in output, output[-3000:]
    assert "n2 has no such interface" in output and "lan0 10.77.0.2" in output


def test_an_interface_that_reaches_nobody_is_named(network, recipe):
    """Both hosts have `far0`, and nothing is between them: bounded time, and the addresses that were tried."""
    for number, host in enumerate(HOSTS, start=1):
        name = network.name[host]
        sh(f"ip -n {name} link add far0 type veth peer name far1")
        for device in (f"addr add 10.78.0.{number}/24 dev far0", "link set far1 up", "link set far0 up"):
            sh(f"ip -n {name} {device}")
    started = time.monotonic()
    try:
        check = words("multinode", "check", recipe)
        status, output = network.run("n1", check, IFNAME="far0", MASTER_ADDR=HOSTS["n1"], deadline_s=120)
    finally:
        for host in HOSTS:
            sh(f"ip -n {network.name[host]} link del far0")
    assert status != 0 and time.monotonic() - started < TIMEOUT_S + 60
    assert "n1 (10.78.0.1 on far0) cannot reach n2 (10.78.0.2 on far0)" in output, output[-3000:]


@pytest.fixture(scope="module")
def wide_recipe(tmp_path_factory) -> Path:
    """Models large enough for their traffic to drown that of barriers; every row has the same length."""
    folder = tmp_path_factory.mktemp("wide")
    fields = write_run_inputs(folder)
    for name, hidden_size, seed in (("student", 128, 1), ("teacher", 192, 2)):
        tiny_llama(4096, False, hidden_size, seed, num_layers=3).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 200}]}
    (folder / "data" / "train.jsonl").write_text((json.dumps(row) + "\n") * 16)
    # Parameters are gathered anew in the backward pass, as those of a model that does not fit are.
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    fields |= {"lmbda": 0, "max_length": 256, "max_steps": 5, "save_steps": None, "deepspeed": settings}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder / "recipe.yaml"


def test_bytes_between_hosts_match_the_formulas(network, wide_recipe):
    """Interface counters against engine/plan/volume.py, for vocab_parallel_size = node and = world: those of the loss,
    and those of the whole step, within 15%."""
    recipes = []
    for group_size in (2, 4):
        fields = yaml.safe_load(wide_recipe.read_text()) | {"vocab_parallel_size": group_size}
        fields["output_dir"] = str(wide_recipe.parent / f"run_{group_size}")
        recipes.append(str(wide_recipe.with_name(f"recipe_{group_size}.yaml")))
        Path(recipes[-1]).write_text(yaml.safe_dump(fields))
    command = ["deepspeed", "--hostfile", network.environment["HOSTFILE"], "--master_addr", HOSTS["n1"]]
    (network.folder / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\n")
    try:
        status, output = network.run("n1", [*command, "--module", "tests.multinode.count_bytes", *recipes])
    finally:
        (network.folder / ".deepspeed_env").unlink()
    assert status == 0, output[-3000:]
    lines = [json.loads(line.split("bytes ", 1)[1]) for line in output.splitlines() if "bytes {" in line]
    print(*lines, sep="\n")
    for line in lines:
        measured, formula = line["measured"], line["formula"]
        assert measured["loss"] == pytest.approx(formula["loss"], rel=0.15)
        assert measured["step"] == pytest.approx(formula["loss"] + formula["zero3"], rel=0.15)
    assert len(lines) == 2
