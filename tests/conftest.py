"""The rule of the `gpu` marker; the file's presence also puts tests/ on the path, for `synthetic_shards`."""

import os

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `gpu` test on a machine without a CUDA device; fail it under REQUIRE_GPU=1."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail("REQUIRE_GPU=1, but torch sees no CUDA device")
    pytest.skip("needs a CUDA device")
