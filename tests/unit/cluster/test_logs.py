"""What reaches the console."""

import io
import sys

import pytest
from tqdm import tqdm

from engine.cluster import logs


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_of_libraries_show_on_a_terminal_alone(monkeypatch, capsys, is_terminal):
    console = io.StringIO()
    console.isatty = lambda: is_terminal
    monkeypatch.setattr(logs, "_lines", console)
    with logs.bars_on_console():
        for _ in tqdm(range(3), desc="tokenising"):
            pass
    assert ("tokenising" in console.getvalue()) == is_terminal
    assert ("tokenising" in capsys.readouterr().err) != is_terminal
    assert sys.stderr is not console
