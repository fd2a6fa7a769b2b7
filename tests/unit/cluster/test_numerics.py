"""What a run asks of device and kernels."""

from __future__ import annotations

import sys

import pytest
import torch

from engine.cluster.startup import set_numerics
from engine.config import GKDConfig
from tests.library.launch import run


def test_a_cpu_is_a_cpu_and_has_no_tf32():
    set_numerics(use_cpu=True, tf32=None, full_determinism=False, seed=1)
    set_numerics(use_cpu=True, tf32=False, full_determinism=False, seed=1)
    with pytest.raises(ValueError, match="tf32=true: this device has no TF32"):
        set_numerics(use_cpu=False, tf32=True, full_determinism=False, seed=1)


ON_CPU = """
import engine.trainer
from deepspeed.accelerator import get_accelerator
from engine.cluster.startup import init_distributed, set_numerics
assert get_accelerator().device_name() == "cuda"
set_numerics(use_cpu=True, tf32=None, full_determinism=False, seed=1)
print(init_distributed(60), get_accelerator().device_name())
"""


def test_a_script_trains_on_cpu_where_deepspeed_has_chosen_a_gpu():
    done = run([sys.executable, "-c", ON_CPU], DS_ACCELERATOR="cuda")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "cpu cpu", done.stdout


def test_full_determinism_is_torchs(monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "")
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", cudnn.deterministic)
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    try:
        set_numerics(use_cpu=False, tf32=None, full_determinism=True, seed=1)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_reentrant_checkpointing_is_refused():
    assert GKDConfig(gradient_checkpointing_kwargs={"use_reentrant": False}) is not None
    with pytest.raises(ValueError, match="use_reentrant=false alone is allowed"):
        GKDConfig(gradient_checkpointing_kwargs='{"use_reentrant": true}')
