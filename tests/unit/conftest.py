"""Fixtures of the unit tests."""

import pytest
import torch.distributed as dist

from engine.cluster.collectives import VocabGroups


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> VocabGroups:
    """A world of one rank."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield VocabGroups(0, 1, 1, dist.group.WORLD, dist.group.WORLD)
    dist.destroy_process_group()
