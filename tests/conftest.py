"""Settings of the whole test run, made before torch is imported."""

import os

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
from tiny_models import tiny, token_ids  # noqa: E402

from analog_plugin import AnalogScheme, calibrate_ranges, convert_to_analog  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("ANALOG_PLUGIN_CACHE", str(tmp_path_factory.mktemp("cache")))


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
