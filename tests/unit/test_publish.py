"""Publishing: pushes to a real HTTP server, a hub that refuses, is silent or not there; the model card."""

from __future__ import annotations

import logging
import time

import pytest
from huggingface_hub import ModelCard

from engine.config import GKDConfig
from engine.publish import hub as hub_module
from engine.publish.card import OURS, Origin, ReadMe, build_card, hub_name, is_of_a_user
from engine.publish.hub import Hub
from tests.library.hub import TOKEN, fake_hub, taken_for_the_hub


@pytest.fixture
def server():
    with fake_hub() as server, taken_for_the_hub(server.url):
        yield server


def config(tmp_path, **fields) -> GKDConfig:
    return GKDConfig(output_dir=str(tmp_path / "run"), **({"push_to_hub": True, "hub_token": TOKEN} | fields))


@pytest.fixture
def model(tmp_path):
    """A run folder in which a model was saved."""
    folder = tmp_path / "run"
    for name, text in {
        "config.json": "{}", "model.safetensors": "weights", "metrics.jsonl": "{}", "config.yaml": "x", "a.txt": "a",
        "checkpoints/step_1/model.pt": "x", "final/config.json": "x", "logs/rank_0.log": "x", ".writing_final/x": "x",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_push_is_what_the_hub_has(server, model, tmp_path):
    hub = Hub(config(tmp_path, hub_model_id="me/student", hub_private_repo=True, hub_revision="v1"), is_main=True)
    hub.open()
    assert hub.repo_id == "me/student" and server.private == {"me/student": True}
    hub.push(model, "first")
    commit = hub.finish()
    assert commit.commit_message == "first" and commit.commit_url.startswith(f"{server.url}/me/student/commit/")
    assert server.branches == [("me/student", "v1")]
    assert server.files == {
        ("me/student", "v1"): {"config.json": b"{}", "model.safetensors": b"weights", "a.txt": b"a"}
    }
    hub.push(model, "second", revision="main")
    hub.finish()
    assert server.files["me/student", "main"].keys() == server.files["me/student", "v1"].keys()
    assert server.commits == ["first", "second"]


def test_a_run_folder_gives_its_name_and_a_repository_may_be_there(server, model, tmp_path):
    for _ in range(2):
        hub = Hub(config(tmp_path), is_main=True)
        hub.open()
        assert hub.repo_id == "me/run"
    assert server.private == {"me/run": False}


def test_other_ranks_say_nothing(server, model, tmp_path):
    hub = Hub(config(tmp_path), is_main=False)
    hub.open()
    assert hub.push(model, "x") is None and hub.finish() is None and server.commits == []


def test_pushes_wait_for_each_other_and_nobody_for_them(server, model, tmp_path):
    hub, always = (Hub(config(tmp_path, hub_always_push=flag), is_main=True) for flag in (False, True))
    hub.open()
    server.delay_s = 0.5
    assert hub.takes_checkpoint() and always.takes_checkpoint()
    started_s = time.monotonic()
    pushes = [one.push(model, f"{i}") for i in range(2) for one in (hub, always)]
    assert time.monotonic() - started_s < 0.4 and not any(push.done() for push in pushes)
    assert not hub.takes_checkpoint() and always.takes_checkpoint()
    hub.finish(), always.finish()
    assert all(push.done() for push in pushes) and hub.takes_checkpoint()
    assert sorted(server.commits) == ["0", "0", "1", "1"] and server.commits[0] == "0"
    assert not Hub(config(tmp_path, hub_strategy="end"), is_main=True).takes_checkpoint()


def test_a_temporary_folder_goes_when_it_was_pushed(server, model, tmp_path):
    hub = Hub(config(tmp_path), is_main=True)
    hub.push(model, "x", is_temporary=True)
    hub.finish()
    assert server.commits == ["x"] and not model.exists()


@pytest.mark.parametrize(
    "fields,text",
    [
        ({"hub_token": "hf_wrong"}, "the hub refuses run: .*401"),
        ({"hub_model_id": "them/student"}, "the hub refuses them/student: .*403"),
        ({"hub_model_id": "a/b/c"}, "hub_model_id='a/b/c' cannot be a repository's name"),
    ],
)
def test_a_refusal_at_the_start_is_the_users_mistake(server, tmp_path, fields, text):
    with pytest.raises(ValueError, match=text) as raised:
        Hub(config(tmp_path, **fields), is_main=True).open()
    assert "hf_wrong" not in str(raised.value)


def assert_the_run_goes_on(tmp_path, model, caplog, reason: str) -> None:
    hub = Hub(config(tmp_path), is_main=True)
    with caplog.at_level(logging.WARNING):
        hub.open()
        assert reason in caplog.text and "the run goes on" in caplog.text
        push = hub.push(model, "x")
        assert push is not None and hub.finish() is None
    assert TOKEN not in caplog.text and (model / "config.json").is_file()


def test_a_dead_port_costs_a_warning(model, tmp_path, caplog):
    with taken_for_the_hub(None):
        assert_the_run_goes_on(tmp_path, model, caplog, "ConnectError")
    assert "'x' was not pushed to run" in caplog.text


def test_a_hub_that_is_silent_is_not_waited_for(server, model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(hub_module, "ANSWER_S", 0.3)
    monkeypatch.setattr(hub_module, "AGREE_S", 0.1)
    server.is_silent = True
    started_s = time.monotonic()
    assert_the_run_goes_on(tmp_path, model, caplog, "no answer in 0 s")
    assert time.monotonic() - started_s < 5 and "1 pushes to run are given up" in caplog.text


def test_a_hub_that_comes_back_gets_the_push(server, model, tmp_path):
    hub = Hub(config(tmp_path), is_main=True)
    with taken_for_the_hub(None):
        hub.open()
    hub.push(model, "x")
    assert hub.finish() is not None and hub.repo_id == "me/run"


FIGURES = {"train/loss": 0.5, "eval/divergence": 0.25, "eval/perplexity": 12.0, "train/lr": 1.0}


def card(tmp_path, origin: Origin, **names) -> ModelCard:
    given = GKDConfig(output_dir=str(tmp_path / "run"), beta=0.25)
    ReadMe(build_card(given, origin, FIGURES, {"torch": "2.13"}, **names)).save_pretrained(tmp_path)
    return ModelCard.load(tmp_path / "README.md")


def test_a_card_names_what_the_hub_knows(tmp_path):
    loaded = card(tmp_path, Origin("org/small", "org/large", "org/chats", 30, 8), tags=["x", "gkd"], model_name="tiny")
    data = loaded.data
    assert data.base_model == "org/small" and data.datasets == "org/chats" and data.tags == ["gkd", "distillation", "x"]
    assert data.library_name == "transformers" and data.model_name == "tiny"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "divergence": 0.25, "perplexity": 12.0
    }  # fmt: skip
    for text in ("# tiny", "org/large", "2306.13649", "| beta | 0.25 |", "| optimizer steps | 30 |", "| torch | 2.13 |",
                 "| held-out divergence, references | 0.2500 |", "agarwal2024"):  # fmt: skip
        assert text in loaded.text, text


def test_a_card_names_no_path_of_this_machine(tmp_path):
    paths = [tmp_path / name for name in ("student", "teacher", "data.jsonl")]
    for path in paths:
        path.touch()
    loaded = card(tmp_path, Origin(*map(str, paths), 30, 8))
    assert loaded.data.base_model is None and loaded.data.datasets is None and loaded.data.eval_results is None
    assert str(tmp_path) not in loaded.content


def test_a_card_that_somebody_changed_is_theirs(tmp_path):
    path = tmp_path / "README.md"
    assert not is_of_a_user(path)
    card(tmp_path, Origin("org/small", None, None, 1, 1))
    assert not is_of_a_user(path)
    path.write_text(path.read_text().replace(OURS, "") + "more\n")
    assert is_of_a_user(path)


@pytest.mark.parametrize("name", ["./a", "/path/to", "a/b/c", "~/a", "../a", "", None])
def test_a_path_is_no_name_of_the_hub(name):
    assert hub_name(name) is None and hub_name("a/b") == "a/b" and hub_name("gpt2") == "gpt2"


def test_a_folder_here_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("models/student") == "models/student"
    (tmp_path / "models" / "student").mkdir(parents=True)
    assert hub_name("models/student") is None
