"""Schemes: what they refuse, and that they survive a round trip."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analog_plugin import AnalogScheme
from analog_plugin.plugins import UnknownName
from analog_plugin.presets import AFM, resolve_scheme
from analog_plugin.scheme import SchemeError

bits = st.one_of(st.none(), st.integers(2, 16))
schemes = st.builds(
    AnalogScheme,
    input_bits=st.integers(2, 16),
    output_bits=bits,
    weight_bits=bits,
    input_range=st.sampled_from(["learned", "static", "dynamic"]),
    range_init=st.sampled_from(["std", "max", "percentile", "mse"]),
    range_init_std=st.floats(0.1, 100),
    out_bound=st.floats(0.01, 1000),
    weight_noise=st.floats(0, 0.99),
    clip_sigma=st.one_of(st.none(), st.floats(0.1, 100)),
    tile_rows=st.one_of(st.none(), st.integers(1, 5000)),
    tie_ranges=st.sampled_from([(), (("q_proj", "k_proj"),), (("a", "b"), ("c", "d", "e"))]),
)


@given(schemes)
def test_round_trips_keep_every_field(scheme):
    assert AnalogScheme.from_dict(scheme.to_dict()) == scheme
    assert AnalogScheme.from_json(scheme.to_json()) == scheme
    assert AnalogScheme.from_yaml(scheme.to_yaml()) == scheme


@given(st.integers(1, 20000), st.one_of(st.none(), st.integers(1, 3000)))
def test_tiles_are_balanced_and_cover_all_rows(features, rows):
    tiles = AnalogScheme(tile_rows=rows).tiles(features)
    assert sum(tiles) == features
    assert max(tiles) - min(tiles) <= 1
    assert rows is None or max(tiles) <= rows


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_bits", 1),
        ("input_bits", 17),
        ("input_bits", True),
        ("input_bits", 8.0),
        ("output_bits", 1),
        ("weight_bits", 17),
        ("weight_noise", -0.01),
        ("weight_noise", float("nan")),
        ("clip_sigma", 0.0),
        ("clip_sigma", -2.5),
        ("tile_rows", 0),
        ("tile_columns", -1),
        ("out_bound", 0.0),
        ("range_init", "median"),
        ("range_init_batches", 0),
        ("range_percentile", 101),
        ("range_min_percentage", 1.5),
        ("input_range", "fixed"),
        ("clip_schedule", "linear"),
        ("tie_ranges", (("alone",),)),
        ("tie_ranges", "q_proj"),
        ("prefix", 1),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(field, value):
    with pytest.raises(SchemeError) as caught:
        AnalogScheme(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} is ")
    assert "must be" in message and f"write {field}:" in message
    assert "\n" not in message


def test_an_adc_without_a_dac_is_refused():
    with pytest.raises(SchemeError, match="output_bits is 8, but must be null where input_bits"):
        AnalogScheme(input_bits=None)


def test_an_unknown_field_suggests_the_close_one():
    with pytest.raises(SchemeError, match="no field 'clip_sigmas'; did you mean 'clip_sigma'"):
        AnalogScheme.from_dict({"clip_sigmas": 3})
    with pytest.raises(SchemeError, match="did you mean 'tile_rows'"):
        AFM.replace(tile_row=3)


@pytest.mark.parametrize("text", ["[1, 2]", "{", "3"], ids=["list", "broken", "number"])
def test_text_that_is_no_scheme_is_refused(text):
    with pytest.raises(SchemeError):
        AnalogScheme.from_json(text)
    with pytest.raises(SchemeError):
        AnalogScheme.from_yaml(text)


def test_a_scheme_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AFM.clip_sigma = 3.0


def test_afm_holds_the_published_values():
    assert (AFM.input_bits, AFM.output_bits, AFM.out_bound) == (8, 8, 14.0)
    assert (AFM.weight_noise, AFM.clip_sigma) == (0.03, 2.5)
    assert (AFM.range_init_std, AFM.range_init_batches, AFM.range_decay) == (18.0, 500, 0.01)


def test_a_recipe_names_a_preset_and_changes_it():
    assert resolve_scheme("AFM") == AFM
    assert resolve_scheme({"preset": "AFM", "tile_rows": 512}) == AFM.replace(tile_rows=512)
    assert resolve_scheme({"tile_rows": 512}) == AnalogScheme(tile_rows=512)
    assert resolve_scheme("DIGITAL_SI8_W4").weight_bits == 4
    with pytest.raises(UnknownName, match="no preset 'AFN'; did you mean 'AFM'"):
        resolve_scheme("AFN")
