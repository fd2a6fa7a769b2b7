"""Optimizers and schedules by name: what is built, and what is refused before a model loads."""

import math

import pytest
import torch
from torch import nn
from transformers.training_args import OptimizerNames

from engine.config import GKDConfig
from engine.config.optimizers import KIND_OF, REFUSED, optimizer_arguments
from engine.inputs import Inputs, check_objects
from engine.models.optimizer import Lion, build_optimizer, check_given
from engine.models.schedule import MetricSchedule, build_schedule, check_schedule, given_schedule
from engine.zero.settings import resolve_deepspeed


def test_every_optimizer_of_transformers_has_an_answer():
    assert {name.value for name in OptimizerNames} <= KIND_OF.keys() | REFUSED.keys()
    assert not KIND_OF.keys() & REFUSED.keys()


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"optim": "adafactor"}, "optim=adafactor is not supported: it looks at whole matrices.*flat pieces"),
        ({"optim": "paged_adamw_8bit"}, "blocks of 8 or 4 bits would lie otherwise at each number of ranks"),
        ({"optim": "adamw_troch"}, r"did you mean adamw_torch\?.*must be one of adamw_torch"),
        ({"optim": "sgd", "optim_args": "momentum"}, "must be written name=value"),
        ({"optim": "sgd", "optim_args": "lr=1"}, "optim=sgd takes momentum, dampening, nesterov there, and not lr"),
        ({"optim_args": "amsgrad=true"}, "optim=adamw_torch_fused takes none there"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "optim_args momentum='much'"),
    ],
    ids=str,
)
def test_what_is_refused_in_the_configuration(fields, words):
    with pytest.raises(ValueError, match=words):
        GKDConfig(**fields)


def test_arguments_have_their_types():
    text = "momentum=0.9, nesterov=true"
    assert optimizer_arguments("sgd", text) == {"momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize(
    "fields,kind,values",
    [
        ({}, torch.optim.AdamW, {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-6, "fused": True}),
        ({"optim": "adamw_torch"}, torch.optim.AdamW, {"fused": None}),
        ({"optim": "lion_32bit"}, Lion, {"lr": 1e-3, "betas": (0.8, 0.9)}),
        ({"optim": "sgd", "optim_args": "momentum=0.5"}, torch.optim.SGD, {"lr": 1e-3, "momentum": 0.5}),
        ({"optim": "rmsprop", "optim_args": "alpha=0.9"}, torch.optim.RMSprop, {"alpha": 0.9}),
    ],
    ids=str,
)
def test_what_is_built(fields, kind, values):
    common = {"learning_rate": 1e-3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    config = GKDConfig(**common, **fields)
    assert "optimizer" not in resolve_deepspeed(config, 1)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {name: optimizer.param_groups[0][name] for name in values} == values


def test_lion_takes_the_steps_of_its_paper():
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([param], lr=0.1, betas=(0.5, 0.75), weight_decay=0.5)
    weights, moment = torch.tensor([1.0, -2.0]), torch.zeros(2)
    for gradient in (torch.tensor([2.0, -1.0]), torch.tensor([-1.0, -4.0]), torch.tensor([0.5, 9.0])):
        param.grad = gradient
        optimizer.step()
        update = (0.5 * moment + 0.5 * gradient).sign()
        weights = weights - 0.1 * (update + 0.5 * weights)
        moment = 0.75 * moment + 0.25 * gradient
        torch.testing.assert_close(param.detach(), weights)


STAGE3 = {"zero_optimization": {"stage": 3}}
OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    "fields,block",
    [
        ({"optim": "adamw_apex_fused"}, "AdamW"),
        ({"optim": "muon", "optim_args": "momentum=0.9,muon_lr=0.01"}, "Muon"),
        ({"deepspeed": OFFLOAD}, "AdamW"),  # DeepSpeed's CPU Adam
        ({"deepspeed": OFFLOAD, "optim": "lion"}, "Lion"),
        ({"deepspeed": OFFLOAD | {"zero_force_ds_cpu_optimizer": False}, "optim": "lion"}, None),
        ({"deepspeed": OFFLOAD, "optim": "sgd"}, None),
        ({"deepspeed": STAGE3 | {"optimizer": {"type": "Lion"}}}, "Lion"),
        (
            {"deepspeed": STAGE3 | {"optimizer": {"type": "Adam"}}, "optim": "adamw_hf"},
            "Adam",
        ),
    ],
    ids=str,
)
def test_what_deepspeed_is_to_build(fields, block):
    settings = resolve_deepspeed(GKDConfig(**fields), 1)
    assert settings.get("optimizer", {}).get("type") == block
    if fields.get("optim") == "muon":
        params = settings["optimizer"]["params"]
        assert params["momentum"] == 0.9 and params["muon_lr"] == 0.01 and params["torch_adam"] is True
        assert settings["zero_optimization"]["reduce_scatter"] is False
    if fields.get("optim") == "sgd":
        assert settings["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    "settings,fields,is_given,words",
    [
        (
            {"optimizer": {"type": "Lion"}},
            {"optim": "sgd"},
            False,
            "'Lion' contradicts.*`optim` is sgd",
        ),
        ({"optimizer": {"type": "SGD"}}, {"optim": "sgd", "optim_args": "momentum=1"}, False, "into its `params`"),
        ({"optimizer": {"type": "SGD"}}, {}, True, "an optimizer was handed over: take one of them out"),
        ({"zero_force_ds_cpu_optimizer": True} | OFFLOAD, {"optim": "sgd"}, False, "optim=sgd is none of DeepSpeed's"),
        (
            {"zero_force_ds_cpu_optimizer": True} | OFFLOAD,
            {},
            True,
            "handed over is none of DeepSpeed's CPU",
        ),
    ],
    ids=str,
)
def test_the_json_and_another_choice(settings, fields, is_given, words):
    settings = STAGE3 | settings
    with pytest.raises(ValueError, match=words):
        resolve_deepspeed(GKDConfig(deepspeed=settings, **fields), 1, is_given=is_given)


def test_optimizers_that_cannot_be_taken():
    model = nn.Linear(2, 2)
    check_given(torch.optim.SGD(model.parameters(), lr=1), model)
    with pytest.raises(ValueError, match="Adafactor is not known to work element by element"):
        check_given(torch.optim.Adafactor(model.parameters()), model)
    with pytest.raises(ValueError, match="2 of its 2 weights are not the student's"):
        check_given(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1), model)
    with pytest.raises(ValueError, match="lacks 1 of the student's weights, bias the first"):
        check_given(torch.optim.SGD([model.weight], lr=1), model)
    stepped = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    stepped.step()
    with pytest.raises(ValueError, match="has taken steps"):
        check_given(stepped, model)
    with pytest.raises(ValueError, match="optim='sgd', and optimizers= has an optimizer"):
        check_objects(GKDConfig(optim="sgd"), Inputs(model=model, optimizer=stepped))
    with pytest.raises(ValueError, match="the student comes by name"):
        check_objects(GKDConfig(), Inputs(optimizer=stepped))


def rates(config: GKDConfig, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    schedule = build_schedule(optimizer, config, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({"lr_scheduler_type": "linear", "warmup_steps": 0.25}, [0, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_scheduler_type": "constant", "warmup_steps": 2}, [1] * 8),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.2}, [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.0}},
         [0.5 + 0.5 * math.cos(2 * math.pi * step / 8) for step in range(8)]),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2.0, "lr_end": 0.0}'},
         [(1 - step / 8) ** 2 for step in range(8)]),
        ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2,
          "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "linear"}}, [0, 0.5, 1, 1, 1, 1, 1, 0.5]),
    ],
    ids=lambda value: value["lr_scheduler_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_rates_of_schedules(fields, expected):
    fields = fields | {"learning_rate": 1.0}
    if fields["lr_scheduler_type"] == "linear":
        expected = [0, 0.5, *expected[2:]]  # a quarter of 8 steps
    assert rates(GKDConfig(**fields), 8) == pytest.approx(expected)


@pytest.mark.parametrize(
    "name,kwargs",
    [
        ("cosine_with_restarts", {"num_cycles": 2}), ("inverse_sqrt", {"timescale": 4}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}), ("cosine_warmup_with_min_lr", {"min_lr": 1e-6}),
        ("reduce_lr_on_plateau", {"patience": 0}), ("greedy", {"min_lr": 1e-6}),
    ],
)  # fmt: skip
def test_the_other_schedules_are_there(name, kwargs):
    check_schedule(GKDConfig(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, eval_strategy="steps", eval_steps=1))


@pytest.mark.parametrize(
    "name,kwargs,words",
    [
        ("cosine", {"cycles": 2}, "lr_scheduler_type=cosine with lr_scheduler_kwargs={'cycles': 2}: .*'cycles'"),
        ("cosine", {"num_cycles": "two"}, "lr_scheduler_type=cosine with"),
        ("cosine_with_min_lr", None, "min_lr"),
        ("warmup_stable_decay", None, "num_decay_steps"),
        ("constant", {"num_cycles": 2}, "constant takes none"),
    ],
)
def test_arguments_that_a_schedule_does_not_take(name, kwargs, words):
    with pytest.raises(ValueError, match=words):
        check_schedule(GKDConfig(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs))


def test_a_schedule_by_metric_moves_with_evaluations_alone():
    config = GKDConfig(
        learning_rate=1.0, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1,
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = build_schedule(optimizer, config, 4)
    assert isinstance(schedule, MetricSchedule)
    found = []
    for loss in (3.0, 2.0, 2.5, 1.0):
        schedule.step()
        schedule.observe({"eval_loss": loss})
        found.append(schedule.get_last_lr())
    assert found == [[1.0], [1.0], [0.5], [0.5]]
    with pytest.raises(ValueError, match="goes by eval_loss, and there are eval_perplexity"):
        schedule.observe({"eval_perplexity": 1.0})


def test_schedules_that_are_handed_over():
    def new():
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    optimizer, config = new(), GKDConfig()
    own = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert given_schedule(own, optimizer, config) is own
    made = given_schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), optimizer, config)
    assert made.get_last_lr() == [1.0]
    with pytest.raises(ValueError, match="is that of another optimizer"):
        given_schedule(own, new(), config)
    with pytest.raises(ValueError, match="str is no schedule"):
        given_schedule("cosine", optimizer, config)


@pytest.mark.parametrize("name", ["polynomial", "linear", "cosine"])
def test_a_warm_up_of_any_length_passes_the_check(name):
    check_schedule(GKDConfig(lr_scheduler_type=name, warmup_steps=10))


def test_a_schedule_goes_by_the_metric_of_one_of_several_sets():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    config = GKDConfig(
        lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0}, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="eval_a_loss",
    )  # fmt: skip
    schedule = build_schedule(optimizer, config, 10)
    for loss in (1.0, 2.0):
        schedule.observe({"eval_a_loss": loss, "eval_b_loss": 0.0})
    assert schedule.get_last_lr() == [0.1]
