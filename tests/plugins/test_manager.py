"""Plugins: what is offered, and what happens when a plugin is wrong."""

import inspect
import textwrap
from types import SimpleNamespace

import pluggy
import pytest
from torch import nn

from analog_plugin.errors import MissingExtra, require
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


def entry_point(name, plugin):
    return SimpleNamespace(
        name=name, value="chip.hooks", load=lambda: plugin, dist=SimpleNamespace(name="chip-noise")
    )


@pytest.fixture
def installed(monkeypatch):
    """Call with entry points to make them the only installed ones."""

    def install(*points):
        monkeypatch.setattr(manager, "entry_points", lambda group: list(points))
        get_plugin_manager.cache_clear()

    yield install
    monkeypatch.undo()
    get_plugin_manager.cache_clear()


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
    assert {"aihwkit", "llmcompressor"} <= {
        name for name, _ in get_plugin_manager().list_name_plugin()
    }


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


def test_a_misspelled_hook_of_an_installed_plugin_is_caught(installed):
    class Misspelled:
        @hookimpl
        def analog_noise_modles(self):
            return ()

    installed(entry_point("misspelled", Misspelled()))
    with pytest.raises(PluginError, match="analog_noise_modles"):
        get_plugin_manager()


def test_a_broken_entry_point_names_its_distribution(installed):
    def load():
        raise ImportError("no module named missing_chip")

    broken = entry_point("broken", None)
    broken.load = load
    installed(broken)
    with pytest.raises(PluginError, match=r"chip\.hooks of chip-noise.*missing_chip"):
        get_plugin_manager()


def test_a_hook_with_an_unknown_argument_names_its_distribution(installed):
    class Asks:
        @hookimpl
        def analog_noise_models(self, colour):
            return ()

    installed(entry_point("asks", Asks()))
    with pytest.raises(PluginError, match=r"'asks' \(chip\.hooks of chip-noise\).*colour"):
        get_plugin_manager()


def test_two_entry_points_of_one_module_are_named(installed):
    plugin = Offers(NoiseModel("x", dict))
    installed(entry_point("first", plugin), entry_point("second", plugin))
    with pytest.raises(PluginError, match=r"'first' and 'second'.*same module"):
        get_plugin_manager()


def test_two_entry_points_of_one_name_are_an_error(installed):
    points = [entry_point("same", Offers(NoiseModel(name, dict))) for name in "xy"]
    installed(*points)
    with pytest.raises(PluginError, match="Two plugins are called 'same'"):
        get_plugin_manager()


def _nothing():
    return None


def _fails():
    raise ImportError("no module named missing_chip")


@pytest.mark.parametrize(
    ("hook", "reason"), [(_nothing, "NoneType"), (_fails, "missing_chip")], ids=["none", "raises"]
)
def test_a_failing_hook_names_its_provider(hook, reason):
    class Fails:
        @hookimpl
        def analog_noise_models(self):
            return hook()

    with pytest.raises(PluginError, match=f"'failing' fails in analog_noise_models.*{reason}"):
        noise_models(manager_with(failing=Fails()))


def test_a_missing_extra_in_a_hook_keeps_its_own_sentence():
    class Needs:
        @hookimpl
        def analog_noise_models(self):
            require("no_such_host", "eval")
            return ()

    with pytest.raises(MissingExtra, match="no_such_host"):
        noise_models(manager_with(needs=Needs()))


READERS = {
    "analog_noise_models": noise_models,
    "analog_presets": presets,
    "analog_layers": layer_types,
    "analog_exporters": exporters,
    "analog_modifiers": modifiers,
    "analog_evaluators": evaluators,
}


@pytest.mark.parametrize("hook", READERS)
def test_the_example_of_each_hook_runs(hook):
    example = inspect.getdoc(getattr(hookspecs, hook)).partition("Example::\n")[2]
    names = {}
    exec(textwrap.dedent(example), names)
    before = READERS[hook](manager_with())
    after = READERS[hook](manager_with(example=SimpleNamespace(**{hook: names[hook]})))
    assert len(after) == len(before) + 1


def test_every_hook_has_a_reader():
    assert {name for name in vars(hookspecs) if name.startswith("analog_")} == set(READERS)


def test_an_unknown_name_suggests_a_close_one_and_lists_all():
    with pytest.raises(
        UnknownName, match=r"'pmc'; did you mean 'pcm'\? known: gaussian, hermes, ir_drop,"
    ):
        lookup(noise_models(), "pmc", "noise model")


def test_an_unknown_name_lists_what_there_is():
    known = "gaussian, hermes, ir_drop, pcm, pcm_like, reram_cmo, reram_wan2022, rtn, stuck"
    with pytest.raises(UnknownName, match=rf"known: {known}\."):
        lookup(noise_models(), "zzz", "noise model")
