"""Presets, and the forms in which a recipe names a scheme."""

import pytest

from analog_plugin import AnalogError, AnalogScheme
from analog_plugin.plugins import UnknownName, presets
from analog_plugin.presets import AFM, DIGITAL_SI8_W4, resolve_scheme
from analog_plugin.scheme import FUSED_GROUPS, SchemeError


@pytest.mark.parametrize("name", ["AFM", "DIGITAL_SI8_W4"])
def test_every_preset_is_found_by_its_name_and_survives_a_round_trip(name):
    scheme = resolve_scheme(name)
    assert isinstance(scheme, AnalogScheme)
    assert AnalogScheme.from_yaml(scheme.to_yaml()) == scheme
    assert name in presets()


def test_the_papers_preset_differs_from_the_defaults_in_its_initialisation_alone():
    assert AFM.range_init_in_training
    assert AFM.replace(range_init_in_training=False) == AnalogScheme()


def test_the_digital_baseline_has_nothing_analog_about_it():
    assert DIGITAL_SI8_W4.weight_noise == 0
    assert DIGITAL_SI8_W4.output_bits is None and DIGITAL_SI8_W4.clip_sigma is None
    assert (DIGITAL_SI8_W4.input_bits, DIGITAL_SI8_W4.weight_bits) == (8, 4)
    assert DIGITAL_SI8_W4.tie_ranges == FUSED_GROUPS


def test_a_scheme_resolves_to_itself():
    scheme = AnalogScheme(tile_rows=256)
    assert resolve_scheme(scheme) is scheme


def test_a_mapping_changes_the_preset_that_it_names():
    fields = {"preset": "DIGITAL_SI8_W4", "weight_bits": 8}
    assert resolve_scheme(fields) == DIGITAL_SI8_W4.replace(weight_bits=8)
    assert fields == {"preset": "DIGITAL_SI8_W4", "weight_bits": 8}  # and stays as it was


@pytest.mark.parametrize("empty", [{}, {"preset": None}], ids=str)
def test_a_mapping_without_a_preset_changes_the_defaults(empty):
    assert resolve_scheme({**empty, "clip_sigma": 3.0}) == AnalogScheme(clip_sigma=3.0)


@pytest.mark.parametrize("form", [str, lambda name: {"preset": name}], ids=["name", "mapping"])
def test_an_unknown_preset_lists_the_known_ones(form):
    with pytest.raises(UnknownName) as caught:
        resolve_scheme(form("nonsense"))
    assert "no preset 'nonsense'" in str(caught.value)
    assert all(name in str(caught.value) for name in presets())


@pytest.mark.parametrize("given", [3, None, ["AFM"], {"preset": 3}], ids=str)
def test_what_names_no_scheme_is_refused_in_one_sentence(given):
    with pytest.raises(AnalogError) as caught:
        resolve_scheme(given)
    assert "\n" not in str(caught.value)


def test_a_wrong_field_beside_a_preset_is_refused():
    with pytest.raises(SchemeError, match="did you mean 'clip_sigma'"):
        resolve_scheme({"preset": "AFM", "clip_sigm": 3.0})
    with pytest.raises(SchemeError, match=r"clip_sigma is -1\.0"):
        resolve_scheme({"preset": "AFM", "clip_sigma": -1.0})


def test_a_field_that_is_no_name_is_refused():
    with pytest.raises(AnalogError, match="has no field 1"):
        resolve_scheme({"preset": "AFM", 1: 2})
