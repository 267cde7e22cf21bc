# SPDX-License-Identifier: MIT
"""What all tests share: a runner for the command line, and what the markers ask for."""

import importlib.util

import pytest
from click.testing import CliRunner


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("tensorrt") and importlib.util.find_spec("tensorrt") is None:
        pytest.skip("tensorrt is not installed")
    if item.get_closest_marker("gpu"):
        import torch  # here, so that tests without the marker can be run without waiting for it

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
