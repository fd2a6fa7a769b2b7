"""`max_length` against the positions that a model has, before any weight is read."""

import logging

import pytest
from transformers import DbrxConfig, GPT2Config, LlamaConfig, MambaConfig, OPTConfig

from engine.models.backbone import check_positions

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@pytest.mark.parametrize("config", [GPT2Config(n_positions=64), OPTConfig(max_position_embeddings=64)])
def test_a_table_of_positions_ends(config, caplog):
    check_positions(config, 64, "student", may_warn=True)
    assert not caplog.messages
    with pytest.raises(ValueError, match=r"max_length=65: the teacher \((gpt2|opt)\) has 64 positions.*to 64"):
        check_positions(config, 65, "teacher", may_warn=False)


@pytest.mark.parametrize("config", [LlamaConfig(max_position_embeddings=64), DbrxConfig(max_seq_len=64)])
def test_rotary_positions_go_on_with_a_warning(config, caplog):
    with caplog.at_level(logging.WARNING):
        check_positions(config, 64, "student", may_warn=True)
        check_positions(config, 65, "student", may_warn=False)
        assert not caplog.messages
        check_positions(config, 65, "student", may_warn=True)
    assert "max_length=65 is beyond the max_position_embeddings=64 of the student" in caplog.text
    assert "rope scaling" in caplog.text


def test_scaled_and_absent_positions(caplog):
    scaled = LlamaConfig(max_position_embeddings=64, rope_parameters=YARN)
    for config, limit in ((scaled, 256), (MambaConfig(), 10**6)):
        check_positions(config, limit, "student", may_warn=True)
    assert not caplog.messages
    check_positions(scaled, 257, "student", may_warn=True)
    assert "max_position_embeddings=256" in caplog.text
