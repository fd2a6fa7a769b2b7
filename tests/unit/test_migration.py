"""The page for who comes from TRL: each line of what differs names tests that are there."""

from __future__ import annotations

import ast
import re

from tests.library.paths import ROOT

PAGE = ROOT / "engine" / "TRL.md"


def differences() -> dict[str, list[str]]:
    """Subject of each line of the table, and the tests that it names."""
    table = PAGE.read_text().split("\n## What differs\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: re.findall(r"`(test_\w+)`", row[-1]) for row in rows if len(row) == 4 and row[0] != "---"}


def test_every_line_names_tests_that_are_there():
    known = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    lines = differences()
    assert len(lines) >= 19
    assert {subject: names for subject, names in lines.items() if not names or not set(names) <= known} == {}
