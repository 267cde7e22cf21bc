# SPDX-License-Identifier: MIT
"""What tests share: a runner for the command line, one thread, and what the markers ask for."""

import importlib.util
from collections.abc import Iterator

import pytest
from click.testing import CliRunner


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch with one: two on small tensors wait for each other longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("tensorrt") and importlib.util.find_spec("tensorrt") is None:
        pytest.skip("tensorrt is not installed")
    if item.get_closest_marker("gpu"):
        import torch  # here, so that tests without the marker can be run without waiting for it

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
