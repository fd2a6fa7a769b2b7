"""Tracking: the record is exact, a resume leaves no step twice, and no tracker can stop or hold up a run."""

import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from engine.config import GKDConfig, config_from_dict
from engine.tracking.command import hide_secrets
from engine.tracking.progress import format_duration
from engine.tracking.tracker import Tracker, has_wandb_key, wandb_mode
from tests.library.paths import ROOT
from tests.library.runs import read_lines

AWKWARD_FLOATS = [1 / 3, 0.1 + 0.2, 1e-300, 5e-324, math.pi * 1e12, -0.0]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def build_tracker(run_dir: Path, is_main: bool = True, run_id: str | None = None, **fields) -> Tracker:
    fields = {"report_to": "none", "logging_steps": 1, "max_steps": 4, **fields}
    return Tracker(GKDConfig(**fields), run_dir, is_main, run_id, {"deepspeed_resolved": {"train_batch_size": 8}})


def test_metrics_read_back_exactly(tmp_path):
    tracker = build_tracker(tmp_path)
    for step, value in enumerate(AWKWARD_FLOATS, start=1):
        tracker.log(step, {"train/loss": value, "train/on_policy": step % 2 == 0, "train/tokens": 10**15 + step})
    lines = read_lines(tracker.metrics_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # Bit for bit: comparing the numbers would let -0.0 pass as 0.0.
    assert [struct.pack("d", line["train/loss"]) for line in lines] == [struct.pack("d", x) for x in AWKWARD_FLOATS]
    assert lines[3]["train/on_policy"] is True and lines[3]["train/tokens"] == 10**15 + 4


def test_each_line_is_on_disk_when_log_returns(tmp_path):
    tracker = build_tracker(tmp_path)
    tracker.log(1, {"train/loss": 0.5})
    assert read_lines(tracker.metrics_path) == [{"step": 1, "train/loss": 0.5}]


def test_config_is_written_as_resolved_and_loads_again(tmp_path):
    tracker = build_tracker(tmp_path, beta=0.25)
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config_from_dict(values) == tracker.config


def test_resume_leaves_no_step_twice(tmp_path):
    first = build_tracker(tmp_path)
    first.begin(0, total_steps=4)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
        first.table("samples", step, ["text"], [[f"at {step}"]])
    with first.metrics_path.open("a") as file:
        file.write('{"step": 4, "train/lo')  # the crash came in the middle of a line

    resumed = build_tracker(tmp_path, run_id=first.run_id)
    resumed.begin(2, total_steps=4)
    for step in (3, 4):
        resumed.log(step, {"train/loss": float(step)})
    assert [(line["step"], line["train/loss"]) for line in read_lines(resumed.metrics_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0),
    ]  # fmt: skip
    assert [line["text"] for line in read_lines(tmp_path / "tables/samples.jsonl")] == ["at 1", "at 2"]
    assert resumed.run_id == first.run_id


def test_fresh_start_begins_a_new_record(tmp_path):
    build_tracker(tmp_path).log(0, {"eval/divergence": 1.0})
    tracker = build_tracker(tmp_path)
    tracker.begin(0, total_steps=4)
    tracker.log(1, {"train/loss": 2.0})
    assert read_lines(tracker.metrics_path) == [{"step": 1, "train/loss": 2.0}]


def test_timers_add_up_until_the_next_log(tmp_path):
    tracker = build_tracker(tmp_path)
    for _ in range(2):
        with tracker.time("rollout"):
            time.sleep(0.02)
    tracker.log(1, {})
    tracker.log(2, {})
    first, second = read_lines(tracker.metrics_path)
    assert 0.04 <= first["perf/rollout_s"] < 1.0
    assert "perf/rollout_s" not in second


def test_other_ranks_write_nothing(tmp_path, capsys):
    tracker = build_tracker(tmp_path / "run", is_main=False, run_id="abc", report_to="wandb")
    tracker.begin(0, total_steps=4)
    with tracker.time("rollout"):
        pass
    tracker.log(1, {"train/loss": 1.0})
    tracker.table("samples", 1, ["text"], [["a"]])
    tracker.finish()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == "" and tracker.run_id == "abc"


def test_metrics_that_cannot_be_written_stop_the_run(tmp_path):
    tracker = build_tracker(tmp_path)
    tracker.metrics_path.mkdir()
    with pytest.raises(IsADirectoryError):
        tracker.log(1, {"train/loss": 1.0})


def test_console_prints_what_is_wanted_and_the_ends(tmp_path, capsys):
    tracker = build_tracker(tmp_path)
    tracker.begin(0, total_steps=10)
    for step in range(1, 11):
        tracker.log(step, {"train/loss": 0.25, "train/divergence": 0.125, "train/grad_norm": 3.0, "train/lr": 1e-4,
                           "perf/tokens_per_s": 99.6}, is_wanted=step % 4 == 0)  # fmt: skip
    tracker.log(10, {"eval/perplexity": 12.5})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 1/10",
        "step 4/10",
        "step 8/10",
        "step 10/10",
        "step 10/10",
    ]
    assert "loss 0.2500 | divergence 0.1250 | grad norm 3.000 | lr 1.00e-04 | 100 tokens/s | ETA" in lines[1]
    assert lines[-1] == "step 10/10 | eval/perplexity 12.5000"


@pytest.mark.parametrize(("seconds", "text"), [(8.2, "9s"), (250, "4m10s"), (3720, "1h02m"), (59.5, "1m00s")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_wandb_mode_is_online_only_with_a_key(monkeypatch, tmp_path):
    assert (wandb_mode("auto"), wandb_mode("online"), wandb_mode("offline")) == ("offline", "offline", "offline")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "a" * 40)
    assert has_wandb_key() and wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert (wandb_mode("auto"), wandb_mode("offline")) == ("online", "offline")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert (wandb_mode("auto"), wandb_mode("online")) == ("offline", "online")


def test_no_record_has_the_token(tmp_path, monkeypatch):
    token = "hf_" + "x" * 9
    words = ["train.py", "--hub_token", token, f"--push-to-hub-token={token}", "--beta", "1"]
    monkeypatch.setattr(sys, "argv", list(words))
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    hidden = ["train.py", "--hub_token", "<hidden>", "--push-to-hub-token=<hidden>", "--beta", "1"]
    assert hide_secrets(words) == hidden
    tracker = build_tracker(tmp_path, report_to="tensorboard", hub_token=token)
    tracker.begin(0, total_steps=1)
    tracker.log(1, {"train/loss": 0.5})
    tracker.finish()
    assert sys.argv == hidden and tracker.config.hub_token == token
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3 and not any(token.encode() in path.read_bytes() for path in files)


@pytest.mark.lengthy
def test_wandb_offline_run_holds_config_and_history(tmp_path):
    tracker = build_tracker(tmp_path, report_to="wandb", run_name="trial", wandb_tags=["t1"], wandb_group="g")
    tracker.begin(0, total_steps=2)
    for step in (1, 2):
        tracker.log(step, {"train/loss": step / 3})
    tracker.table("samples", 2, ["prompt", "answer"], [["a", "b"]])
    where = Path(tracker.locations["wandb"])
    tracker.finish()
    records = read_wandb(where / f"run-{tracker.run_id}.wandb")

    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name, run.run_group) == (tracker.run_id, "gkd-engine", "trial", "g")
    assert list(run.tags) == ["t1"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["lmbda"] == 0.5 and config["deepspeed_resolved"] == {"train_batch_size": 8}
    assert config["versions"]["wandb"] and "pytest" in config["command"]

    history = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
               for record in records if record.HasField("history")]  # fmt: skip
    assert [(line["step"], line["_step"], line.get("train/loss")) for line in history] == [(1, 1, 1 / 3), (2, 2, 2 / 3)]
    assert history[1]["samples/_type"] == "table-file"
    axes = {record.metric.glob_name or record.metric.name: record.metric.step_metric
            for record in records if record.HasField("metric")}  # fmt: skip
    assert axes["*"] == "step" and axes["train/tokens_total"] == "step"  # the two x-axes


@pytest.mark.lengthy
def test_unreachable_wandb_server_neither_stops_nor_blocks(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    tracker = build_tracker(tmp_path, report_to="wandb", wandb_mode="online")
    start_s = time.perf_counter()
    tracker.begin(0, total_steps=1)
    tracker.log(1, {"train/loss": 0.5})
    where = Path(tracker.locations["wandb"])
    tracker.finish()
    assert time.perf_counter() - start_s < 30  # the time-out itself, wandb's service starting twice, a busy machine
    assert "recording offline" in caplog.text
    assert read_lines(tracker.metrics_path) == [{"step": 1, "train/loss": 0.5}]
    assert where.name.startswith("offline-run-") and (where / f"run-{tracker.run_id}.wandb").exists()


def lose_the_service(run_dir: Path) -> None:
    """Forty steps, with wandb's service process killed after the first."""
    tracker = build_tracker(run_dir, report_to="wandb")
    tracker.begin(0, total_steps=40)
    tracker.log(1, {"train/loss": 0.5})
    services = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("wandb")]
    assert services
    for service in services:
        service.kill()
    psutil.wait_procs(services, timeout=10)
    longest_s = 0.0
    for step in range(2, 41):
        start_s = time.perf_counter()
        tracker.log(step, {"train/loss": 0.5})
        longest_s = max(longest_s, time.perf_counter() - start_s)
    start_s = time.perf_counter()
    tracker.finish()
    assert longest_s < 1.0 and time.perf_counter() - start_s < 10


@pytest.mark.lengthy
def test_training_goes_on_when_wandbs_service_is_killed(tmp_path):
    """Each call returns within a second and the process ends with status 0; in a process of its own, as wandb's library
    starts no second service."""
    code = f"from pathlib import Path; from {__name__} import *; lose_the_service(Path({str(tmp_path)!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not this one's
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb failed and is switched off; training goes on") == 1
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 41))


def test_failing_tracker_is_switched_off_once(tmp_path, caplog):
    class Broken:
        location = None

        def open(self, resumed_step):
            raise RuntimeError("no such server")

    tracker = build_tracker(tmp_path)
    tracker._backends["wandb"] = Broken()
    tracker.begin(0, total_steps=2)
    for step in (1, 2):
        tracker.log(step, {"train/loss": 0.5})
    tracker.finish()
    assert len(caplog.records) == 1 and "no such server" in caplog.text
    assert len(read_lines(tracker.metrics_path)) == 2


def test_several_trackers_fail_one_by_one(tmp_path, caplog):
    """tensorboard has every step although wandb breaks at the second, and the console is told where each one is."""
    from tensorboard.backend.event_processing import event_accumulator as reader

    tracker = build_tracker(tmp_path, report_to=["wandb", "tensorboard"])
    tracker.begin(0, total_steps=3)
    assert set(tracker.locations) == {"wandb", "tensorboard"}
    wandb_run = tracker._backends["wandb"]
    for step in (1, 2, 3):
        if step == 2:
            wandb_run.log = lambda *_: 1 / 0
        tracker.log(step, {"train/loss": step / 4})
    tracker.finish()
    assert caplog.text.count("wandb failed and is switched off") == 1 and set(tracker.locations) == {"tensorboard"}
    events = reader.EventAccumulator(tracker.locations["tensorboard"])
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    wandb_run.finish()


def run_record(tracker: Tracker):
    """What wandb's own file says of the run, once it is finished."""
    tracker.begin(0, total_steps=1)
    (where,) = tracker.locations.values()
    tracker.finish()
    records = read_wandb(Path(where) / f"run-{tracker.run_id}.wandb")
    return next(record.run for record in records if record.HasField("run"))


VARIABLES = {
    "WANDB_PROJECT": "p",
    "WANDB_NAME": "n",
    "WANDB_RUN_ID": "id1",
    "WANDB_RUN_GROUP": "g",
    "WANDB_TAGS": "a,b",
}


def test_wandbs_variables_count_where_a_field_is_unset(tmp_path, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("WANDB_ENTITY", "e")
    tracker = build_tracker(tmp_path / "run", report_to="wandb")
    run = run_record(tracker)
    assert (run.project, run.display_name, run.run_id, run.run_group) == ("p", "n", "id1", "g")
    assert tracker._backends["wandb"].run.entity == "e"  # not in the file of an offline run
    assert list(run.tags) == ["a", "b"] and list((tmp_path / "elsewhere" / "wandb").glob("offline-run-*-id1"))

    fields = {"wandb_project": "ours", "run_name": "ours", "wandb_group": "ours", "wandb_entity": "ours"}
    tracker = build_tracker(tmp_path / "second", report_to="wandb", wandb_tags=["ours"], **fields)
    run = run_record(tracker)
    assert {run.project, run.display_name, run.run_group, *run.tags, tracker._backends["wandb"].run.entity} == {"ours"}


def test_a_resumed_run_keeps_its_id_whatever_the_variable_says(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    run = run_record(build_tracker(tmp_path, report_to="wandb", run_id="mine"))
    assert (run.run_id, run.project) == ("mine", "gkd-engine")
    assert "WANDB_RUN_ID is not used: the resumed run goes on under its own id mine" in caplog.text


@pytest.mark.parametrize("variables", [{"WANDB_DISABLED": "true"}, {"WANDB_DISABLED": "1"}, {"WANDB_MODE": "disabled"}])
def test_wandb_is_off_where_its_variables_say_so(tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracker = build_tracker(tmp_path, report_to="wandb")
    tracker.begin(0, total_steps=1)
    tracker.finish()
    assert tracker.locations == {} and not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert wandb_mode("offline") == "offline"  # a field that is set counts


def test_tensorboard_events_read_back(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as reader

    tracker = build_tracker(tmp_path, report_to="tensorboard")
    tracker.begin(0, total_steps=3)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": step / 4})
    tracker.finish()
    resumed = build_tracker(tmp_path, report_to="tensorboard", run_id=tracker.run_id)
    resumed.begin(2, total_steps=3)
    resumed.log(3, {"train/loss": 5.0})
    resumed.table("samples", 3, ["prompt", "answer"], [["a|b", "c\nd"]])
    resumed.finish()
    events = reader.EventAccumulator(resumed.locations["tensorboard"])
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.5), (3, 5.0)]
    assert "samples/text_summary" in events.Tags()["tensors"]


def test_none_writes_metrics_alone(tmp_path):
    tracker = build_tracker(tmp_path)
    tracker.begin(0, total_steps=1)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish()
    assert tracker.locations == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]


def read_wandb(path: Path, timeout_s: float = 20.0) -> list:
    """The protobuf records of a finished run; wandb's service still writes for a moment after `finish` returns."""
    deadline_s = time.perf_counter() + timeout_s
    while True:
        records = parse_wandb(path.read_bytes())
        if records and records[-1].HasField("exit"):
            return records
        assert time.perf_counter() < deadline_s, f"{path} has no exit record after {timeout_s} s"
        time.sleep(0.1)


def parse_wandb(data: bytes) -> list:
    """The whole records in a `.wandb` file: a 7-byte file header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, parts, records = 7, [], []
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        if len(part) < length:
            break
        parts.append(part)
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(b"".join(parts)))
            parts = []
    return records
