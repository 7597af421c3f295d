"""Our models in aihwkit-lightning's format: its own loader reads them, and they come back exact."""

import pickle
import sys

import dill
import pytest
import torch
from lightning_models import lightning_config, lightning_model, publish
from tiny_models import token_ids, word_tokenizer

from analog_integrations.lightning import import_lightning, to_lightning
from analog_integrations.lightning.config import LightningConfig, config_of_record
from analog_integrations.lightning.pickles import parse_record
from analog_integrations.lightning.schemes import config_of, scheme_of
from analog_plugin import AnalogError, AnalogScheme, load_checkpoint, save_checkpoint
from analog_plugin.layers import analog_layers
from analog_plugin.layers.prefix import install_prefix
from optimum.analog import main_profile


@torch.no_grad()
def logits(model):
    return model(token_ids(seed=9)).logits


def as_lightning_loads_it(directory):
    """By the code that the model card shows, in the directory's own words."""
    card = (directory / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("this-directory", str(directory))
    names = {}
    exec(code, names)
    return names["model"].eval()


SCHEMES = {
    "AFM": {},
    "one tile": {"tile_rows": None},
    "no ADC": {"output_bits": None},
    "other bits": {"input_bits": 6, "output_bits": 10, "out_bound": 11.37},
    "no clipping": {"clip_sigma": None},
    "no noise": {"weight_noise": 0.0},
    "static": {"input_range": "static"},
    "dynamic": {"input_range": "dynamic"},
    "no converters": {"input_bits": None, "output_bits": None},
}


@pytest.mark.parametrize("changes", SCHEMES.values(), ids=SCHEMES.keys())
def test_there_and_back_is_exact_and_lightning_computes_the_same(changes, make_analog, tmp_path):
    ours = make_analog("llama", **changes).eval()
    to_lightning(ours, tmp_path / "there")
    theirs, expected = as_lightning_loads_it(tmp_path / "there"), logits(ours)
    assert float((logits(theirs) - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    made = import_lightning(tmp_path / "there", tmp_path / "back", ignore=["lm_head"])
    back = load_checkpoint(tmp_path / "back")
    for (name, before), (other, after) in zip(
        analog_layers(ours), analog_layers(back), strict=True
    ):
        assert name == other and before.tiles == after.tiles
        assert before.scheme == after.scheme == made.scheme
        if ours.model.layers[0].mlp.up_proj.scheme.input_range != "dynamic":
            assert torch.equal(before.input_range, after.input_range)
    for key, value in ours.state_dict().items():
        if not key.endswith("input_range"):
            assert torch.equal(back.state_dict()[key], value), key
    assert torch.equal(logits(back), expected)


@pytest.mark.parametrize("name", ["phi3", "qwen2"])
def test_other_architectures_come_back_exact(name, make_analog, tmp_path):
    ours = make_analog(name, ignore=()).eval()
    to_lightning(ours, tmp_path / "there")
    expected = logits(ours)
    theirs = logits(as_lightning_loads_it(tmp_path / "there"))
    assert float((theirs - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    import_lightning(tmp_path / "there", tmp_path / "back")
    assert torch.equal(logits(load_checkpoint(tmp_path / "back")), expected)


def test_a_tied_digital_head_stays_tied(make_analog, tmp_path):
    ours = make_analog("llama", tie=True).eval()
    to_lightning(ours, tmp_path / "there")
    theirs = as_lightning_loads_it(tmp_path / "there")
    assert float((logits(theirs) - logits(ours)).abs().max()) < 1e-5
    import_lightning(tmp_path / "there", tmp_path / "back")
    back = load_checkpoint(tmp_path / "back")
    assert back.config.tie_word_embeddings
    assert back.lm_head.weight.data_ptr() == back.model.embed_tokens.weight.data_ptr()


def test_theirs_to_ours_to_theirs_is_exact(tmp_path):
    config = lightning_config(32)
    theirs = lightning_model("phi3", config)
    import_lightning(publish(theirs, config, tmp_path / "published"), tmp_path / "ours")
    to_lightning(tmp_path / "ours", tmp_path / "again")
    again = as_lightning_loads_it(tmp_path / "again")
    assert torch.equal(logits(again), logits(theirs))
    with (tmp_path / "again" / "rpu_config").open("rb") as file:
        assert dill.load(file) == config


def test_training_there_goes_on_from_our_ranges(make_analog, tmp_path):
    ours = make_analog("llama", range_init_batches=2)
    to_lightning(ours, tmp_path / "there")
    theirs = as_lightning_loads_it(tmp_path / "there").train()
    before = theirs.model.layers[0].mlp.up_proj.input_range.detach().clone()
    out = theirs(token_ids(), labels=token_ids())
    assert torch.equal(theirs.model.layers[0].mlp.up_proj.input_range.detach(), before)
    out.loss.backward()
    assert theirs.model.layers[0].mlp.up_proj.input_range.grad is not None
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    torch.save(dict(theirs.state_dict()), tmp_path / "there" / "pytorch_model.bin")
    import_lightning(tmp_path / "there", tmp_path / "back")
    back = load_checkpoint(tmp_path / "back").model.layers[0].mlp.up_proj
    assert torch.equal(back.weight, theirs.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(back.input_range, theirs.model.layers[0].mlp.up_proj.input_range)


def test_layers_kept_digital_are_those_that_the_card_excludes(make_analog, tmp_path):
    ours = make_analog("llama", overrides={"model.layers.1.mlp.down_proj": "digital"}).eval()
    to_lightning(ours, tmp_path / "there")
    theirs = as_lightning_loads_it(tmp_path / "there")
    names = [name for name, _ in theirs.named_analog_layers()]
    assert names == [name for name, _ in analog_layers(ours)]
    made = import_lightning(tmp_path / "there", tmp_path / "back")
    assert made.layers == tuple(names)
    assert torch.equal(logits(load_checkpoint(tmp_path / "back")), logits(ours))


def test_what_is_not_carried_stands_in_the_card(make_analog, tmp_path):
    ours = make_analog(
        "llama", tie_ranges=[["q_proj", "k_proj", "v_proj"]], tile_columns=16,
        range_gradient="lsq", clip_schedule="anneal", range_init="max",
    )  # fmt: skip
    to_lightning(ours, tmp_path / "there")
    card = (tmp_path / "there" / "README.md").read_text()
    (note,) = (line for line in card.splitlines() if "no counterpart" in line)
    for field in ("tie_ranges", "tile_columns", "range_gradient", "clip_schedule", "range_init"):
        assert field in note
    assert "weight_noise" not in note and "out_bound" not in note


REFUSED = {
    "prefix": ({"prefix": 1}, "a digital prefix"),
    "overrides": ({"overrides": {"o_proj": {"input_bits": 6}}}, "fields of their own"),
    "weight_bits": ({"weight_bits": 4}, "weights that are rounded in training alone"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_lightning_cannot_express_is_refused(changes, message, make_analog, tmp_path):
    ours = make_analog("llama", **changes)
    if "prefix" in changes:
        install_prefix(ours, [1])
    with pytest.raises(AnalogError, match=message):
        to_lightning(ours, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_transposed_layers_are_refused(make_analog, tmp_path):
    with pytest.raises(AnalogError, match="transposed layer"):
        to_lightning(make_analog("gpt2"), tmp_path / "there")


def test_weights_that_are_rounded_already_go_along(make_analog, tmp_path):
    from analog_plugin.ops.weights import column_maximum, fake_quantize_columns

    ours = make_analog("llama", weight_bits=4, out_bound=11.37).eval()
    for _, layer in analog_layers(ours):
        weight = layer.weight.data
        peak = column_maximum(weight, layer.tiles)
        layer.weight.data = fake_quantize_columns(weight, peak, layer.tiles, 4)
    to_lightning(ours, tmp_path / "there")
    theirs, expected = as_lightning_loads_it(tmp_path / "there"), logits(ours)
    assert float((logits(theirs) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    made = import_lightning(tmp_path / "there", tmp_path / "back")
    assert made.scheme.weight_bits == 4


def test_it_is_a_profile_of_the_command_too(make_analog, tmp_path, capsys):
    ours = make_analog("llama")
    save_checkpoint(ours, tmp_path / "ours", tokenizer=word_tokenizer())
    main_profile(tmp_path / "ours", tmp_path / "there", profile="lightning")
    assert "| lightning | 0." in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert {"config.json", "pytorch_model.bin", "rpu_config", "tokenizer.json"} <= names
    theirs = as_lightning_loads_it(tmp_path / "there")
    assert float((logits(theirs) - logits(ours.eval())).abs().max()) < 1e-5


def test_without_aihwkit_lightning_the_error_says_what_to_install(
    make_analog, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "aihwkit_lightning.simulator.configs", None)
    with pytest.raises(AnalogError, match=r"pip install \"analog-plugin\[lightning\]\""):
        to_lightning(make_analog("llama"), tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_defaults_and_members_are_those_of_the_installed_package():
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig

    config, notes = config_of_record(parse_record(pickle.dumps(TorchInferenceRPUConfig())))
    assert config == LightningConfig() and notes == []
    assert set(vars(LightningConfig())) == set(vars(config))


@pytest.mark.parametrize("changes", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_scheme_and_its_configuration_are_each_others(changes):
    scheme = AnalogScheme(tile_rows=32).replace(**changes)
    back, notes = scheme_of(config_of(scheme))
    assert back.replace(out_bound=scheme.out_bound) == scheme and notes == []
