import pytest
from tiny_models import tiny, token_ids

from analog_plugin import AnalogScheme, calibrate_ranges, convert_to_analog


@pytest.fixture
def make_analog():
    """A tiny analog model with calibrated ranges and several tiles."""

    def make(name="llama", tie=False, *, ignore=("lm_head",), dtype=None, **scheme):
        model = tiny(name, tie)
        if dtype is not None:
            model = model.to(dtype)
        convert_to_analog(model, AnalogScheme(**({"tile_rows": 32} | scheme)), ignore)
        calibrate_ranges(model, [{"input_ids": token_ids()}])
        return model

    return make
