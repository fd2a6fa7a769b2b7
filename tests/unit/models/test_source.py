"""How a model that comes by name is loaded: init kwargs, and revisions of a hub repository."""

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from engine.config import GKDConfig
from engine.config.source import ModelSource, student_source, teacher_source
from engine.data.tokenizer import load_tokenizer
from engine.inputs import Inputs, check_objects
from engine.models.backbone import download_model, load_causal_lm, read_generation_config, read_model_config
from engine.models.weights import find_tensor_files
from tests.library.models import tiny_llama, tiny_tokenizer


def test_init_kwargs_go_before_the_fields():
    config = GKDConfig(
        model_name_or_path="org/a", teacher_model_name_or_path="org/b", attn_implementation="eager",
        model_init_kwargs={"torch_dtype": torch.bfloat16, "revision": "v2", "use_cache": False, "device_map": None},
        teacher_model_init_kwargs='{"attn_implementation": "sdpa", "trust_remote_code": true, "dtype": "auto"}',
    )  # fmt: skip
    assert student_source(config) == ModelSource("org/a", "eager", False, "v2")
    assert teacher_source(config) == ModelSource("org/b", "sdpa", True, None)
    assert config.model_init_kwargs["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"device_map": "auto"}, "`device_map`='auto' is not supported: ZeRO-3 puts the weights where they belong"),
        ({"quantization_config": {"load_in_4bit": True}}, "`quantization_config`=.* cannot be partitioned"),
        ({"dtype": "int8"}, "`dtype`='int8': must be one of auto, float32, bfloat16, float16"),
        ({"attn_implementation": "flash"}, "`attn_implementation`='flash': must be one of eager, sdpa"),
        ({"revison": "x"}, "has `revison`, which is not passed on; allowed are attn_implementation, revision"),
        ({"trust_remote_code": "maybe"}, "must be true or false"),
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_init_kwargs_that_cannot_be(field, kwargs, words):
    with pytest.raises(ValueError, match=f"{field}.*{words}"):
        GKDConfig(**{field: kwargs})


def test_init_kwargs_of_an_object_are_an_error():
    with pytest.raises(ValueError, match="teacher_model_init_kwargs says how.*teacher_model= came as an object"):
        check_objects(GKDConfig(teacher_model_init_kwargs={"dtype": "auto"}), Inputs(teacher_model=nn.Linear(1, 1)))


def test_a_revision_is_taken_of_all_files(monkeypatch, tmp_path):
    """A cache as the hub's client fills it, with two revisions of one model."""
    repository, sizes = tmp_path / "models--org--model", {"main": 16, "v2": 32}
    (repository / "refs").mkdir(parents=True)
    for number, (revision, hidden_size) in enumerate(sizes.items()):
        commit = f"{number}" * 40
        (repository / "refs" / revision).write_text(commit)
        folder = repository / "snapshots" / commit
        model, tokenizer = tiny_llama(259, hidden_size=hidden_size), tiny_tokenizer()
        model.generation_config.eos_token_id = 7 + number
        tokenizer.eos_token = ["<|im_end|>", "<|end|>"][number]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision, hidden_size in sizes.items():
        source = ModelSource("org/model", revision=None if revision == "main" else revision)
        download_model(source)
        config = read_model_config(source)
        files = find_tensor_files(source)
        model = load_causal_lm(source, torch.float32, None)
        eos = ["main", "v2"].index(revision)
        assert config.hidden_size == model.config.hidden_size == hidden_size
        assert files is not None and files.shapes["model.norm.weight"] == torch.Size([hidden_size])
        assert read_generation_config(source, config).eos_token_id == 7 + eos
        assert load_tokenizer("org/model", False, source.revision).eos_token == ["<|im_end|>", "<|end|>"][eos]
    with pytest.raises(ValueError, match="model 'org/model': .* nor a reachable hub model of revision 'v3'"):
        read_model_config(ModelSource("org/model", revision="v3"))
