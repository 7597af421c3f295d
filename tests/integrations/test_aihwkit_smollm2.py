"""A real trained model on aihwkit's tiles: a heavy run, for `make test-slow`."""

import copy
import math

import pytest
import torch
from adc_codes import count_flips

from analog_integrations.aihwkit import evaluate_drift, to_aihwkit
from analog_plugin import calibrate_ranges, convert_to_analog, prepare_start
from analog_plugin.data import evaluation_tokens
from analog_plugin.demo import resolve_model
from analog_plugin.evaluation import Reference
from analog_plugin.evaluation.fidelity import fidelity
from analog_plugin.layers import analog_layers, model_scheme, scheme_changed, to_digital
from analog_plugin.noise import resolve_noise
from analog_plugin.presets import AFM_PLUS
from analog_plugin.pretrained import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.slow
MODEL = "demo:smollm2-135m-instruct"
TIMES = ("0s", "1h", "1d", "1y")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The digital original, the analog model at its best start, and tokens it has not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANALOG_PLUGIN_CACHE", str(tmp_path_factory.mktemp("demo")))
        source = resolve_model(MODEL)
    rows = evaluation_tokens(load_tokenizer(source), 26, 128)
    original = load_causal_lm(source, name=MODEL, dtype=torch.float32).eval()
    model = load_causal_lm(source, name=MODEL, dtype=torch.float32).eval()
    convert_to_analog(model, AFM_PLUS.replace(digital_share=0.0, range_init_batches=4))
    batches = [{"input_ids": batch} for batch in rows[:16].split(4)]
    prepare_start(model, batches, rows[16:24], resolve_noise("pcm"))
    return original, model, rows[24:]


def test_without_converters_the_whole_model_computes_the_same(prepared):
    _, model, tokens = prepared
    with scheme_changed(model, {"input_bits": None, "output_bits": None}):
        found = fidelity(to_aihwkit(model), tokens, Reference.of(model, tokens, keep_logits=True))
    assert found["kl"] <= 1e-3 and found["agreement"] > 0.99


@pytest.mark.parametrize("tile_rows", [None, 512], ids=["one tile", "2 or 3 tiles"])
def test_in_float64_the_whole_model_computes_the_same(prepared, tile_rows):
    _, model, tokens = prepared
    if tile_rows is not None:
        scheme = model_scheme(model).replace(tile_rows=tile_rows, range_init="mse")
        model = convert_to_analog(to_digital(copy.deepcopy(model)), scheme)
        calibrate_ranges(model, [{"input_ids": tokens}])
    # Codes times bf16 weights may lie exactly between two codes of a bound such as 5.6 = 28 / 5,
    # where float64 rounds to either side too; of an irrational bound they cannot.
    bound = model_scheme(model).out_bound * (1 + math.pi / 1000)
    with scheme_changed(model, {"out_bound": bound}):
        converted = to_aihwkit(model, dtype=torch.float64, drift_compensation=False)
        exact = copy.deepcopy(model).double()
    assert tokens.numel() >= 256
    found = fidelity(converted, tokens, Reference.of(exact, tokens, keep_logits=True))
    assert found["kl"] <= 1e-3 and found["agreement"] == 1


def test_every_layer_computes_the_same_on_identical_inputs(prepared):
    # Whole models part with converters in fp32: one output on another code spreads through 30
    # blocks, as it does between two runs of the model here whose embeddings differ by 1e-6.
    _, model, tokens = prepared
    converted = to_aihwkit(model)
    flipped = total = 0

    def compare(layer, args, y):
        nonlocal flipped, total
        z = converted.get_submodule(layer.name)(args[0])
        count, outputs = count_flips(layer, y, z)
        flipped, total = flipped + count, total + outputs

    handles = [layer.register_forward_hook(compare) for _, layer in analog_layers(model)]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    assert total > 10_000_000 and flipped < total / 1000


def test_kl_grows_with_time(prepared):
    original, model, tokens = prepared
    report = evaluate_drift(
        to_aihwkit(model, "hermes"), tokens, TIMES, 5, reference=Reference.of(original, tokens)
    )
    means = [report.mean(f"programmed@{time}", "kl") for time in TIMES]
    assert report.mean("none", "kl") < means[0] and means == sorted(means)
    assert means[-1] > 1.2 * means[0]
