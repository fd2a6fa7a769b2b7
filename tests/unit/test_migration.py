"""The page for who comes from TRL: each line of what differs names tests that are there."""

from __future__ import annotations

import ast
import re

from tests.library.paths import ROOT

PAGE = ROOT / "engine" / "TRL.md"


def tables() -> dict[str, list[str]]:
    """First cell of each line of the tables under the first two headings, and the tests that its last one names."""
    text = PAGE.read_text().split("\n## What differs\n")[1].split("\n## Fields\n")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {
        row[0]: re.findall(r"`(test_\w+)`", row[-1]) for row in rows if row[0] not in ("---", "TRL 1.16", "TRL's test")
    }


def test_every_line_names_tests_that_are_there():
    known = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    lines = {subject: names for subject, names in tables().items() if subject != "those with Liger"}
    assert len(lines) >= 25
    assert {subject: names for subject, names in lines.items() if not names or not set(names) <= known} == {}
