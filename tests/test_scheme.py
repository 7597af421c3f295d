"""Schemes: what they refuse, and that they survive a round trip."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from analog_plugin import AnalogScheme
from analog_plugin.plugins import UnknownName
from analog_plugin.presets import AFM, resolve_scheme
from analog_plugin.scheme import SchemeError

bits = st.one_of(st.none(), st.integers(2, 16))
positive = st.floats(1e-6, 1e6)
fields = {
    "input_bits": st.integers(2, 16),
    "input_range": st.sampled_from(["learned", "static", "dynamic"]),
    "range_init": st.sampled_from(["std", "max", "percentile", "mse", "output"]),
    "range_init_std": positive,
    "range_init_batches": st.integers(1, 10**6),
    "range_percentile": st.floats(1e-6, 100),
    "range_decay": st.floats(0, 10),
    "range_min_percentage": st.floats(0, 1),
    "range_gradient": st.sampled_from(["paper", "lsq"]),
    "output_bits": bits,
    "out_bound": st.one_of(st.none(), positive),
    "adc_bound": st.sampled_from(["clean", "noisy"]),
    "weight_noise": st.floats(0, 0.99),
    "weight_bits": bits,
    "clip_sigma": st.one_of(st.none(), positive),
    "clip_schedule": st.sampled_from(["constant", "anneal"]),
    "clip_anneal_share": st.floats(1e-6, 1),
    "tile_rows": st.one_of(st.none(), st.integers(1, 5000)),
    "tile_columns": st.one_of(st.none(), st.integers(1, 5000)),
    "prefix": st.sampled_from([None, 1, (5,), (0, 7, 2)]),
    "rescale": st.sampled_from([None, "noise-aware"]),
    "digital_share": st.floats(0, 0.99),
    "overrides": st.sampled_from(
        [(), (("down_proj", "digital"),), (("*.0.*", (("input_bits", 6),)), ("a", "digital"))]
    ),
    "tie_ranges": st.sampled_from([(), (("q_proj", "k_proj"),), (("a", "b"), ("c", "d", "e"))]),
}
schemes = st.one_of(
    st.builds(AnalogScheme, **fields),
    st.just(AnalogScheme(input_bits=None, output_bits=None)),
    st.just(AnalogScheme(range_init_in_training=True)),
)


@given(schemes)
def test_round_trips_keep_every_field(scheme):
    assert AnalogScheme.from_dict(scheme.to_dict()) == scheme
    assert AnalogScheme.from_json(scheme.to_json()) == scheme
    assert AnalogScheme.from_yaml(scheme.to_yaml()) == scheme


@given(st.data(), st.sampled_from(sorted(fields)))
def test_replacing_a_field_changes_that_field_alone(data, name):
    value = data.draw(fields[name])
    before, after = AnalogScheme().to_dict(), AnalogScheme().replace(**{name: value})
    assert getattr(after, name) == value
    assert {k: v for k, v in after.to_dict().items() if k != name} == {
        k: v for k, v in before.items() if k != name
    }


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)
every_field = st.sampled_from([field.name for field in dataclasses.fields(AnalogScheme)])


@given(every_field, junk)
@example("overrides", None)
def test_any_value_is_either_kept_through_a_round_trip_or_refused_in_one_sentence(name, value):
    try:
        scheme = AnalogScheme(**{name: value})
    except SchemeError as error:
        # Both fields are named where one is only wrong beside the other.
        assert name in str(error) and "must be" in str(error) and "\n" not in str(error)
    else:
        assert AnalogScheme.from_dict(scheme.to_dict()) == scheme
        assert AnalogScheme.from_json(scheme.to_json()) == scheme
        assert AnalogScheme.from_yaml(scheme.to_yaml()) == scheme
        hash(scheme)


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
        ("prefix", 2),
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


def test_the_last_change_for_a_pattern_survives_a_file():
    changes = (("a", {"input_bits": 6}), ("*", {"output_bits": 9}), ("a", "digital"))
    scheme = AnalogScheme(overrides=changes)
    read = AnalogScheme.from_dict(scheme.to_dict())
    assert read == scheme
    assert read.for_layer("a") is scheme.for_layer("a") is None


def test_a_field_of_an_override_that_is_no_name_is_refused():
    with pytest.raises(SchemeError, match="which is no field"):
        AnalogScheme(overrides={"a": {1: 2}})
