import copy

import pytest
from tiny_models import tiny, token_ids

from analog_plugin import AnalogScheme, calibrate_ranges, convert_to_analog
from analog_plugin.evaluation import Reference
from analog_plugin.plugins import Evaluator, get_plugin_manager, hookimpl


@pytest.fixture
def original():
    return tiny(num_hidden_layers=1)


@pytest.fixture
def model(original):
    """The original, converted and calibrated, with converters coarse enough to be seen."""
    model = convert_to_analog(copy.deepcopy(original), AnalogScheme(tile_rows=32, input_bits=6))
    calibrate_ranges(model, [{"input_ids": token_ids(4, 16, seed=5)}])
    return model.eval()


@pytest.fixture
def tokens():
    return token_ids(5, 11, seed=2)


@pytest.fixture
def reference(original, tokens):
    return Reference.of(original, tokens)


@pytest.fixture
def register():
    """Registers an evaluator under a name, for one test."""
    manager, plugins = get_plugin_manager(), []

    def make(name, evaluate):
        class Plugin:
            @hookimpl
            def analog_evaluators(self):
                return [Evaluator(name, evaluate)]

        plugins.append(Plugin())
        manager.register(plugins[-1])
        return name

    yield make
    for plugin in plugins:
        manager.unregister(plugin)
