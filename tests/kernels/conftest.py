"""These tests need Triton: on a GPU, or with TRITON_INTERPRET=1 on a CPU (make test-kernels)."""

import pytest
import torch

from analog_plugin.ops.device import has_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items):
    if not has_kernels(DEVICE, [1]):
        why = "needs Triton and a GPU, or Triton and TRITON_INTERPRET=1; see make test-kernels"
        here = [item for item in items if "kernels" in item.path.parts]
        for item in here:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def plainly(monkeypatch):
    """Run something by torch's operators instead."""

    def run(action):
        with monkeypatch.context() as patch:
            patch.setenv("ANALOG_PLUGIN_KERNELS", "0")
            assert not has_kernels(DEVICE, [1])
            return action()

    return run
