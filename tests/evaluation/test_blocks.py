"""Blocks that are known are left out, and only where that changes nothing."""

import pytest
import torch
from tiny_models import tiny, token_ids

from analog_plugin import AnalogScheme, convert_to_analog
from analog_plugin.evaluation import sensitivity
from analog_plugin.evaluation.blocks import KnownBlocks
from analog_plugin.layers import analog_layers
from analog_plugin.training.ranges import calibrate_ranges


def analog(name="llama"):
    model = convert_to_analog(tiny(name), AnalogScheme(out_bound=4.0, range_init="max")).eval()
    calibrate_ranges(model, [{"input_ids": token_ids(4, 17, seed)} for seed in range(2)])
    return model


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "gpt2"])
def test_sensitivity_is_the_same_and_runs_fewer_blocks(name):
    """A batch of all rows is spared what it knows; row by row, every forward is whole."""
    model, tokens = analog(name), token_ids(4, 16, seed=9)
    runs = 0

    def count(*_):
        nonlocal runs
        runs += 1

    found, ran = [], []
    first_block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    handle = next(first_block.children()).register_forward_hook(count)
    for size in (4, 3):
        runs = 0
        report = sensitivity.analyze_sensitivity(model, tokens, parts=("all",), batch_size=size)
        found.append({row.name: row.kl for row in report.rows})
        ran.append(runs / -(-4 // size))
    handle.remove()
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-7)
    assert ran[0] < 0.8 * ran[1]


def test_a_model_whose_blocks_speak_beside_their_outputs_is_run_in_full():
    class Plain(torch.nn.Module):
        def __init__(self, kind=torch.nn.Linear):
            super().__init__()
            self.blocks = torch.nn.ModuleList(kind(4, 4) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    class Backwards(Plain):
        def forward(self, x):
            for block in reversed(self.blocks):
                x = block(x)
            return x

    class Remembering(torch.nn.Linear):
        def forward(self, x, memory):
            memory.append(x)
            return super().forward(sum(memory))

    class Whispering(Plain):
        def __init__(self):
            super().__init__(Remembering)

        def forward(self, x):
            memory = []
            for block in self.blocks:
                x = block(x, memory)
            return x

    torch.manual_seed(0)
    x = torch.randn(2, 4)
    for kind, spared in ((Plain, True), (Backwards, False), (Whispering, False)):
        model = kind().eval()
        with torch.no_grad():
            known = KnownBlocks(model, lambda model=model: model(x))
        assert bool(known.blocks) == spared, kind


def test_forwards_that_a_library_wrapped_are_put_back():
    model, tokens = analog(), token_ids(2, 16)
    block = model.model.layers[0]
    wrapped = block.forward
    block.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    mine = block.forward
    with torch.no_grad():
        known = KnownBlocks(model, lambda: model(tokens).logits)
    name = [name for name, _ in analog_layers(model)][-1]
    with pytest.raises(KeyboardInterrupt), known.before(name):
        assert block.forward is not mine
        raise KeyboardInterrupt
    assert block.forward is mine and "forward" not in vars(model.model.layers[1])
    assert KnownBlocks(torch.nn.Linear(2, 2), lambda: torch.ones(1)).blocks == []
