"""Plugins: what is offered, and what happens when a plugin is wrong."""

from types import SimpleNamespace

import pluggy
import pytest
from torch import nn

from analog_plugin.plugins import (
    NoiseModel,
    PluginError,
    Preset,
    UnknownName,
    builtin,
    evaluators,
    exporters,
    get_plugin_manager,
    hookimpl,
    hookspecs,
    layer_types,
    lookup,
    manager,
    modifiers,
    noise_models,
    presets,
)


def manager_with(**plugins) -> pluggy.PluginManager:
    own = pluggy.PluginManager(hookspecs.PROJECT)
    own.add_hookspecs(hookspecs)
    own.register(builtin, name="analog_plugin")
    for name, plugin in plugins.items():
        own.register(plugin, name=name)
    return own


class Offers:
    """A plugin that yields one given record as a noise model."""

    def __init__(self, record):
        self.record = record

    @hookimpl
    def analog_noise_models(self):
        yield self.record


def test_built_ins_and_our_integrations_come_through_the_hooks():
    assert {"gaussian", "pcm"} <= set(noise_models())
    assert {"AFM", "DIGITAL_SI8_W4"} <= set(presets())
    assert nn.Linear in layer_types()
    assert {"analog-fp", "w8a8"} <= set(exporters())
    assert "fidelity" in evaluators()
    assert modifiers()["AnalogModifier"].path.startswith("analog_integrations.")
    assert get_plugin_manager().get_plugin("llmcompressor") is not None


def test_a_plugin_adds_its_record():
    own = manager_with(mine=Offers(NoiseModel("mine", dict)))
    assert noise_models(own)["mine"].factory is dict


def test_a_duplicate_names_both_providers():
    own = manager_with(first=Offers(NoiseModel("x", dict)), second=Offers(NoiseModel("x", dict)))
    with pytest.raises(PluginError, match=r"'x'.*'(first|second)'.*'(first|second)'"):
        noise_models(own)


def test_a_record_of_the_wrong_type_names_its_provider():
    own = manager_with(wrong=Offers(Preset("x", dict)))
    with pytest.raises(PluginError, match="'wrong' yields Preset from analog_noise_models"):
        noise_models(own)


def test_a_misspelled_hook_is_caught():
    class Misspelled:
        @hookimpl
        def analog_noise_modles(self):
            return ()

    with pytest.raises(PluginError, match="analog_noise_modles"):
        manager.check_hooks(manager_with(misspelled=Misspelled()))


def test_a_broken_entry_point_names_its_distribution(monkeypatch):
    def load():
        raise ImportError("no module named missing_chip")

    broken = SimpleNamespace(
        name="broken", value="chip.hooks", load=load, dist=SimpleNamespace(name="chip-noise")
    )
    monkeypatch.setattr(manager, "entry_points", lambda group: [broken])
    get_plugin_manager.cache_clear()
    try:
        with pytest.raises(PluginError, match=r"chip\.hooks of chip-noise.*missing_chip"):
            get_plugin_manager()
    finally:
        monkeypatch.undo()
        get_plugin_manager.cache_clear()


def test_an_unknown_name_suggests_a_close_one():
    with pytest.raises(UnknownName, match="There is no noise model 'pmc'; did you mean 'pcm'"):
        lookup(noise_models(), "pmc", "noise model")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(UnknownName, match="known: gaussian, pcm"):
        lookup(noise_models(), "zzz", "noise model")
