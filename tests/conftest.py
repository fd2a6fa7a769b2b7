"""What holds for all tests."""

import os
import tempfile

import pytest

_cache = tempfile.TemporaryDirectory(prefix="datasets_")


def pytest_configure():
    """Token ids that tests write go where no run looks for them; `datasets` reads the variable when it is imported."""
    os.environ["HF_DATASETS_CACHE"] = _cache.name
    pytest.register_assert_rewrite("tests.library.runs")  # its asserts show the values, as a test's do
