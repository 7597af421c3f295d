"""Large memory is used again, and never by two tensors at once."""

import copy
import gc
import pickle

import pytest
import torch

from analog_plugin.ops import memory
from analog_plugin.ops.memory import large_empty, release_memory

CPU = torch.device("cpu")
SHAPE = (2048, 4096)  # 32 MiB in fp32


@pytest.fixture(autouse=True)
def released():
    release_memory()
    yield
    release_memory()


def waiting():
    return sum(len(blocks) for blocks in memory._free.values())


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    first = large_empty(SHAPE, torch.float32, CPU)
    place, row = first.data_ptr(), first[3]
    first.fill_(1.0)
    del first
    gc.collect()
    second = large_empty(SHAPE, torch.float32, CPU).fill_(2.0)
    assert second.data_ptr() != place and waiting() == 0
    assert bool((row == 1).all())  # a view holds its memory
    del row
    gc.collect()
    assert waiting() == 1
    third = large_empty((4096, 2048), torch.float32, CPU)
    assert third.data_ptr() == place and waiting() == 0
    assert bool((second == 2).all())


def test_other_types_and_sizes():
    half = large_empty((4096, 4096), torch.bfloat16, CPU)
    assert half.dtype == torch.bfloat16 and half.shape == (4096, 4096) and half.is_contiguous()
    del half
    assert waiting() == 1
    assert large_empty((4097, 4096), torch.bfloat16, CPU).shape == (4097, 4096)
    assert large_empty((3, 0), torch.float32, CPU).shape == (3, 0)
    release_memory()
    assert waiting() == 0


def test_such_a_tensor_is_a_tensor_like_others():
    made = large_empty(SHAPE, torch.float32, CPU).normal_()
    for other in (copy.deepcopy(made), made.clone(), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other, made) and other.data_ptr() != made.data_ptr()
    weight = torch.nn.Parameter(torch.ones(SHAPE))
    weight.grad = made
    torch.optim.SGD([weight], lr=1.0).step()
    torch.testing.assert_close(weight.detach(), 1 - made)


def test_a_layer_in_evaluation_gives_all_up():
    from torch import nn

    from analog_plugin import AnalogLinear, AnalogScheme

    layer = AnalogLinear.from_linear(nn.Linear(4096, 2048, bias=False), AnalogScheme()).train()
    layer.set_input_range(2.0)
    x = torch.randn(2, 4096)
    for _ in range(3):
        layer(x).sum().backward()
        layer.zero_grad()
    gc.collect()
    assert 1 <= waiting() <= 2  # noisy weights and a gradient were in use at one time
    layer.eval()
    assert waiting() == 0
