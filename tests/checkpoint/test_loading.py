"""A loaded checkpoint is a model like any other of transformers."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from analog_plugin import AnalogError, load_checkpoint, save_checkpoint
from analog_plugin.checkpoint.layout import verify_manifest
from analog_plugin.layers import analog_layers
from optimum.analog import AnalogModelForCausalLM


@torch.no_grad()
def logits(model):
    return model(token_ids(seed=5)).logits


@pytest.fixture
def tokenizer():
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w2")


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gpt2"])
def test_programmed_noise_is_reproducible_on_every_architecture(name, make_analog, tmp_path):
    directory = save_checkpoint(make_analog(name), tmp_path / "out")

    def load(**options):
        return logits(AnalogModelForCausalLM.from_pretrained(directory, **options))

    first = load(noise="gaussian:0.05", seed=1)
    assert torch.equal(first, load(noise={"name": "gaussian", "sigma": 0.05}, seed=1))
    assert not torch.equal(first, load(noise="gaussian:0.05", seed=2))
    assert torch.equal(load(noise="none", seed=1), load())


def test_noise_does_not_depend_on_the_global_generator(make_analog, tmp_path):
    directory = save_checkpoint(make_analog(), tmp_path / "out")
    torch.manual_seed(1)
    first = logits(load_checkpoint(directory, noise="pcm", seed=7))
    torch.manual_seed(2)
    assert torch.equal(first, logits(load_checkpoint(directory, noise="pcm", seed=7)))


def test_a_noisy_model_saved_again_is_the_clean_one(make_analog, tmp_path):
    model = make_analog()
    save_checkpoint(model, tmp_path / "a")
    save_checkpoint(load_checkpoint(tmp_path / "a", noise="pcm"), tmp_path / "b")
    assert torch.equal(logits(load_checkpoint(tmp_path / "b")), logits(model))


def test_training_that_goes_on_does_not_find_the_ranges_anew(make_analog, tmp_path):
    save_checkpoint(make_analog(range_init_in_training=True), tmp_path / "out")
    model = load_checkpoint(tmp_path / "out").train()
    before = {name: layer.input_range.detach().clone() for name, layer in analog_layers(model)}
    model(token_ids() % 7)
    for name, layer in analog_layers(model):
        assert torch.equal(layer.input_range, before[name]), name


def test_unknown_noise_is_one_sentence(make_analog, tmp_path):
    save_checkpoint(make_analog(), tmp_path / "out")
    with pytest.raises(AnalogError, match="did you mean 'pcm'"):
        load_checkpoint(tmp_path / "out", noise="pmc")


def test_the_model_is_in_evaluation_mode_and_deterministic(make_analog, tmp_path):
    model = load_checkpoint(save_checkpoint(make_analog(), tmp_path / "out"))
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(model))


def test_a_pipeline_generates_with_the_saved_tokenizer(make_analog, tokenizer, tmp_path):
    directory = save_checkpoint(make_analog(), tmp_path / "out", tokenizer=tokenizer)
    verify_manifest(directory)
    for model in (load_checkpoint(directory), AutoModelForCausalLM.from_pretrained(directory)):
        generate = pipeline(
            "text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(directory)
        )
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        made = generate("w5 w6 w7", return_tensors=True, **options)[0]["generated_token_ids"]
        expected = model.generate(torch.tensor([[5, 6, 7]]), **options)
        assert torch.as_tensor(made).tolist() == expected[0].tolist()
        assert "w5" in generate("w5 w6 w7", **options)[0]["generated_text"]


def test_generation_with_and_without_a_cache_is_the_same(make_analog, tmp_path):
    model = load_checkpoint(save_checkpoint(make_analog(), tmp_path / "out"))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(token_ids(), use_cache=True, **options)
    assert torch.equal(cached, model.generate(token_ids(), use_cache=False, **options))


def test_a_copy_is_independent(make_analog, tmp_path):
    model = load_checkpoint(save_checkpoint(make_analog(), tmp_path / "out"), noise="pcm")
    before = logits(model)
    twin = copy.deepcopy(model)
    for _, layer in analog_layers(twin):
        layer.restore()
        layer.set_input_range(0.1)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_ranges_stay_fp32_in_a_model_loaded_as_bf16(make_analog, tmp_path):
    model = make_analog()
    directory = save_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(directory, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for (_, ours), (_, theirs) in zip(analog_layers(model), analog_layers(loaded), strict=True):
        assert theirs.input_range.dtype == torch.float32
        assert torch.equal(ours.input_range, theirs.input_range)


def test_state_of_a_bf16_model_is_exact_fp32(make_analog, tmp_path):
    model = make_analog(dtype=torch.bfloat16)
    for _, layer in analog_layers(model):
        layer.set_input_range(1.0 + 2.0**-20)  # bf16 would make it 1
    directory = save_checkpoint(model, tmp_path / "out")
    state = load_file(directory / "analog/analog_state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(bool((tensor == 1.0 + 2.0**-20).all()) for tensor in state.values())
    weights = load_file(directory / "model.safetensors")
    assert weights["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_a_device_map_changes_nothing(place, make_analog, tmp_path):
    model = make_analog()
    directory = save_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(directory, device_map=place)
    assert torch.equal(logits(loaded).cpu(), logits(model)) or loaded.device.type != "cpu"


def test_a_relative_path_and_text_load_too(make_analog, tmp_path, monkeypatch):
    model = make_analog()
    save_checkpoint(model, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for path in ("out", "./out", "out/", str(tmp_path / "out")):
        assert torch.equal(logits(load_checkpoint(path)), logits(model))


def test_the_caller_gets_back_the_directory(make_analog, tmp_path):
    assert save_checkpoint(make_analog(), str(tmp_path / "out")) == tmp_path / "out"


def test_parents_of_the_directory_are_made(make_analog, tmp_path):
    save_checkpoint(make_analog(), tmp_path / "a" / "b" / "out")
    assert load_checkpoint(tmp_path / "a" / "b" / "out") is not None


def test_a_model_can_replace_the_directory_it_came_from(make_analog, tmp_path):
    model = make_analog()
    directory = save_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(directory)
    save_checkpoint(loaded, directory, overwrite=True)
    verify_manifest(directory)
    assert torch.equal(logits(load_checkpoint(directory)), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_loader_class_is_not_instantiated():
    with pytest.raises(TypeError, match="from_pretrained"):
        AnalogModelForCausalLM()


def test_a_plain_model_directory_is_refused_with_the_reason(tmp_path):
    from tiny_models import tiny

    tiny().save_pretrained(tmp_path / "plain")
    with pytest.raises(AnalogError, match=r"a plain model without analog state.*analog-fp"):
        AnalogModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_a_recipe_without_export_is_refused(tmp_path):
    with pytest.raises(AnalogError, match="write export=True"):
        AnalogModelForCausalLM.from_pretrained(tmp_path, recipe={})
