"""Models that aihwkit-lightning wrote become checkpoints of ours with the same forward."""

import json
import pickle
import subprocess
import sys

import dill
import pytest
import torch
from lightning_models import lightning_config, lightning_model, publish
from tiny_models import token_ids, word_tokenizer
from transformers import GenerationConfig

from analog_integrations.lightning import import_lightning, to_lightning
from analog_plugin import AnalogError, evaluate_noise, inspect_checkpoint, load_checkpoint
from analog_plugin.layers import analog_layers
from optimum.analog import AnalogModelForCausalLM


@torch.no_grad()
def logits(model, seed=9):
    return model(token_ids(seed=seed)).logits


def enum(name, member):
    from aihwkit_lightning.simulator import configs

    return getattr(getattr(configs, name), member)


def clip(member):
    return enum("WeightClipType", member)


def divergence(a, b):
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    return float((b.exp() * (b - a)).sum(-1).mean())


@torch.no_grad()
def flips(ours, theirs):
    """Outputs of layers on identical inputs that fall on another ADC code, and all outputs."""
    inputs, flipped, total = {}, 0, 0
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
        for name, layer in theirs.named_analog_layers()
    ]
    logits(theirs)
    for hook in hooks:
        hook.remove()
    for name, layer in analog_layers(ours):
        forward = theirs.get_submodule(name).rpu_config.forward
        reference = theirs.get_submodule(name)(inputs[name])
        difference = (layer(inputs[name]) - reference).abs()
        moved = difference > 1e-6 * reference.abs().max()
        if forward.out_res <= 0:
            assert not moved.any(), name
            continue
        blocks = layer.weight.split(layer.tiles, 1)
        ranges = (2 * forward.out_bound / forward.out_res) * layer.input_range
        step = sum(r * b.abs().amax(1) for r, b in zip(ranges, blocks, strict=True))
        assert bool((difference <= step * 1.001).all()), name
        flipped, total = flipped + int(moved.sum()), total + moved.numel()
    return flipped, total


def assert_the_same_forward(ours, theirs):
    """Layer by layer; and as a whole, where one flip spreads through all that lies behind it."""
    flipped, total = flips(ours, theirs)
    assert flipped <= total / 1000
    a, b = logits(ours), logits(theirs)
    equal = (a - b).abs().amax(-1) <= 1e-6 * b.abs().max()
    assert float(equal.float().mean()) > 0.5
    assert divergence(a, b) < 1e-3


CASES = {
    "llama": ("llama", -1, {}),
    "llama, tied": ("llama", -1, {"tie": True}),
    "llama, several tiles": ("llama", 32, {}),
    "phi3": ("phi3", -1, {}),
    "phi3, several tiles": ("phi3", 24, {}),
    "qwen2 with biases": ("qwen2", 32, {}),
    "digital head": ("llama", 32, {"tie": True, "exclude": ["lm_head"]}),
}


@pytest.mark.parametrize(("name", "rows", "options"), CASES.values(), ids=CASES.keys())
def test_the_imported_model_computes_what_lightning_computes(name, rows, options, tmp_path):
    config = lightning_config(rows)
    theirs = lightning_model(name, config, **options)
    made = import_lightning(publish(theirs, config, tmp_path / "published"), tmp_path / "ours")
    assert made.notes == ()
    assert made.layers == tuple(n for n, _ in theirs.named_analog_layers())
    ours = AnalogModelForCausalLM.from_pretrained(tmp_path / "ours")
    for layer, reference in analog_layers(ours):
        stored = theirs.get_submodule(layer)
        assert torch.equal(reference.input_range, stored.input_range)
        assert torch.equal(reference.weight, stored.weight)
        assert reference.tiles == stored.in_sizes
    assert_the_same_forward(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("rows", [-1, 24], ids=["one tile", "several tiles"])
def test_without_an_adc_the_logits_are_lightnings(name, rows, tmp_path):
    config = lightning_config(rows, forward__out_res=-1, forward__out_bound=0.0)
    theirs = lightning_model(name, config)
    import_lightning(publish(theirs, config, tmp_path / "published"), tmp_path / "ours")
    assert_the_same_forward(load_checkpoint(tmp_path / "ours"), theirs)


def test_everything_that_the_configuration_says_stands_in_the_scheme(tmp_path):
    config = lightning_config(
        32, pre_post__input_range__learn_input_range=False,
        pre_post__input_range__input_min_percentage=0.9, forward__inp_res=1 / 62,
        forward__out_res=1022, modifier__std_dev=0.02, clip__sigma=3.0,
    )  # fmt: skip
    theirs = lightning_model("llama", config)
    made = import_lightning(
        publish(theirs, config, tmp_path / "published"), tmp_path / "ours", adc_bound="noisy"
    )
    (scheme,) = {layer.scheme for _, layer in analog_layers(load_checkpoint(tmp_path / "ours"))}
    assert made.scheme == scheme
    fields = scheme.to_dict()
    assert fields["input_bits"] == 6 and fields["output_bits"] == 10
    assert fields["input_range"] == "static" and fields["adc_bound"] == "noisy"
    assert fields["range_init"] == "std" and fields["range_init_std"] == 6.0
    assert fields["range_init_batches"] == 3 and fields["range_min_percentage"] == 0.9
    assert fields["range_decay"] == 0.01 and fields["weight_noise"] == 0.02
    assert fields["clip_sigma"] == 3.0 and fields["out_bound"] == 14.0
    assert fields["tile_rows"] == 32 and fields["weight_bits"] is None


def test_shards_safetensors_and_other_pickles_are_read_alike(tmp_path):
    from safetensors.torch import save_file

    config = lightning_config(32)
    theirs = lightning_model("llama", config)
    expected, places = logits(theirs), []
    places.append(publish(theirs, config, tmp_path / "indexed", shards=2))
    places.append(publish(theirs, config, tmp_path / "bare", shards=3, index=False))
    for protocol in (2, 3, 4, 5):

        def dump(value, protocol=protocol):
            return pickle.dumps(value, protocol=protocol)

        places.append(publish(theirs, config, tmp_path / f"pickle{protocol}", dump=dump))
    places.append(publish(theirs, config, tmp_path / "safe"))
    (places[-1] / "pytorch_model.bin").unlink()
    save_file(dict(theirs.state_dict()), places[-1] / "model.safetensors")
    for place in places:
        import_lightning(place, tmp_path / f"{place.name}-ours")
        ours = load_checkpoint(tmp_path / f"{place.name}-ours")
        assert float((logits(ours) - expected).abs().max()) < 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_it_is_stored_or_becomes_what_is_asked_for(dtype, tmp_path):
    config = lightning_config(32)
    theirs = lightning_model("llama", config).to(dtype)
    source = publish(theirs, config, tmp_path / "published")
    import_lightning(source, tmp_path / "ours")
    ours = load_checkpoint(tmp_path / "ours")
    layer = ours.model.layers[1].mlp.up_proj
    assert layer.weight.dtype == dtype and layer.input_range.dtype == torch.float32
    assert torch.equal(layer.input_range.to(dtype), theirs.model.layers[1].mlp.up_proj.input_range)
    import_lightning(source, tmp_path / "wide", dtype="float32")
    assert load_checkpoint(tmp_path / "wide").dtype == torch.float32


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    config = lightning_config()
    source = publish(lightning_model("llama", config), config, tmp_path / "published")
    word_tokenizer().save_pretrained(source)
    GenerationConfig(temperature=0.3, do_sample=True, bos_token_id=1).save_pretrained(source)
    import_lightning(source, tmp_path / "ours")
    ours = load_checkpoint(tmp_path / "ours")
    assert ours.generation_config.temperature == 0.3
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert inspect_checkpoint(tmp_path / "ours").problems == ()
    report = evaluate_noise(ours, token_ids(2, 16), noise=["pcm"], seeds=2)
    assert report.mean("pcm", "perplexity") > 0


#: Rounded weights and inputs meet ties of an ADC with a bound of 14 exactly; not with this one.
BOUND = 11.37


def version_one(**old):
    """A configuration as version 1 left it: without the fields of version 2."""
    config = lightning_config(32, forward__out_bound=BOUND)
    vars(config.modifier).clear()
    vars(config.modifier).update({"std_dev": 0.03, "res": 62.0, "enable_during_test": False} | old)
    del vars(config.forward)["out_noise_per_channel"]
    return config


@pytest.mark.parametrize(
    "member",
    [
        "NONE", "ADD_NORMAL", "ADD_NORMAL_PER_CHANNEL", "DISCRETIZE", "DISCRETIZE_PER_CHANNEL",
        "DISCRETIZE_ADD_NORMAL", "DISCRETIZE_ADD_NORMAL_PER_CHANNEL",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:You are using the deprecated")
@pytest.mark.filterwarnings("ignore:You created a modifier")
def test_version_1_is_translated_as_lightning_translates_it(member, tmp_path):
    from aihwkit_lightning.simulator.parameters import (
        WeightModifierType,
        WeightNoiseInjectionType,
        WeightQuantizationType,
    )

    changes = {"modifier__type": WeightModifierType[member], "modifier__res": 62.0}
    by_tile = "DISCRETIZE" in member and "PER_CHANNEL" not in member
    if by_tile:  # its ADC would follow the weights before rounding
        changes |= {"forward__out_res": -1, "forward__out_bound": 0.0}
    native = lightning_config(32, **({"forward__out_bound": BOUND} | changes))
    if member == "NONE":
        native.modifier.noise_type = WeightNoiseInjectionType.NONE
    theirs = lightning_model("llama", native)
    translated = next(theirs.analog_layers()).rpu_config.modifier
    old = version_one(type=WeightModifierType[member])
    vars(old.forward).update(vars(native.forward))
    source = publish(theirs, old, tmp_path / "published")
    made = import_lightning(source, tmp_path / "ours")
    noisy = translated.noise_type != WeightNoiseInjectionType.NONE
    assert made.scheme.weight_noise == (0.03 if noisy else 0.0)
    by_column = translated.quantization_type == WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    assert made.scheme.weight_bits == (6 if by_column else None)
    assert_the_same_forward(load_checkpoint(tmp_path / "ours"), theirs)


def test_attributes_of_older_versions_are_named(tmp_path):
    config = lightning_config()
    config.modifier.offset, config.pre_post.input_range.init_with_max = 0.0, False
    source = publish(lightning_model("llama", config), config, tmp_path / "published")
    (note,) = import_lightning(source, tmp_path / "ours").notes
    assert "modifier.offset=0.0" in note and "pre_post.input_range.init_with_max=False" in note
    assert note in (tmp_path / "ours" / "README.md").read_text()


def test_rounded_and_clipped_weights_are_stored_as_every_forward_had_them(tmp_path):
    for i, changes in enumerate((
        {"modifier__quantization_type": enum("WeightQuantizationType", "DISCRETIZE_PER_CHANNEL"),
         "modifier__res": 14.0, "forward__out_bound": BOUND},
        {"modifier__quantization_type": enum("WeightQuantizationType", "DISCRETIZE"),
         "modifier__res": 1 / 30, "forward__out_res": -1, "forward__out_bound": 0.0},
        {"clip__type": clip("LEARNABLE_PER_CHANNEL"), "forward__out_res": -1,
         "forward__out_bound": 0.0},
        {"clip__type": clip("LEARNABLE_PER_CHANNEL"), "modifier__res": 14.0,
         "modifier__quantization_type": enum("WeightQuantizationType", "DISCRETIZE_PER_CHANNEL"),
         "forward__out_res": -1, "forward__out_bound": 0.0},
    )):  # fmt: skip
        config = lightning_config(24, **changes)
        theirs = lightning_model("llama", config)
        for layer in theirs.analog_layers():
            if layer.learnable_weight_clip is not None:
                layer.learnable_weight_clip.data.mul_(0.6)
        made = import_lightning(publish(theirs, config, tmp_path / f"p{i}"), tmp_path / f"o{i}")
        assert any("Weights are stored as" in note for note in made.notes)
        assert_the_same_forward(load_checkpoint(tmp_path / f"o{i}"), theirs)


def test_dynamic_ranges_are_taken_over(tmp_path):
    config = lightning_config(32, pre_post__input_range__dynamic=True)
    theirs = lightning_model("llama", config, exclude=["lm_head"])
    source = publish(theirs, config, tmp_path / "published")
    made = import_lightning(source, tmp_path / "ours", ignore=["lm_head"])
    assert made.scheme.input_range == "dynamic"
    assert_the_same_forward(load_checkpoint(tmp_path / "ours"), theirs)


@pytest.mark.parametrize("member", ["NONE", "LAYER_GAUSSIAN"])
def test_an_adc_of_the_whole_tiles_maximum_is_said_with_figures(member, tmp_path):
    config = lightning_config(32, clip__type=clip(member))
    theirs = lightning_model("llama", config)
    made = import_lightning(publish(theirs, config, tmp_path / "published"), tmp_path / "ours")
    note = next(note for note in made.notes if note.startswith("The ADC's full scale"))
    ratios = torch.cat([
        (b.abs().amax(1) / b.abs().max())
        for layer in theirs.analog_layers() for b in layer.weight.split(layer.in_sizes, 1)
    ])  # fmt: skip
    assert "that of the whole tile" in note
    assert f"{ratios.median():.3g} times" in note and f"{ratios.min():.3g} to 1 times" in note
    # The column's finer full scale is closer to the model without an ADC.
    ours, expected = load_checkpoint(tmp_path / "ours"), logits(theirs)
    for layer in theirs.analog_layers():
        layer.rpu_config.forward.out_res, layer.rpu_config.forward.out_bound = -1, 0.0
    exact = logits(theirs)
    assert divergence(logits(ours), exact) < divergence(expected, exact) < 0.05


REFUSED = {
    "steps": ({"forward__inp_res": 100.0}, "forward.inp_res is 100, but must be a number of steps"),
    "no rounding of inputs": ({"forward__inp_res": -1}, "clips inputs without quantizing them"),
    "no rounding of outputs": ({"forward__out_res": -1}, "bounds outputs without quantizing them"),
    "no bound": ({"forward__out_bound": 0.0}, "quantizes outputs without a bound"),
    "no ranges": ({"pre_post__input_range__enable": False}, "without input ranges"),
    "fast and dynamic": (
        {"pre_post__input_range__dynamic": True, "pre_post__input_range__fast_mode": True},
        "fast_mode with dynamic ranges",
    ),
    "other ranges": ({"mapping__max_input_size": 16}, "must be [4] positive numbers"),
    "a wrong kind": ({"forward__inp_res": "254"}, "forward.inp_res is a str"),
    "nan": ({"forward__out_bound": float("nan")}, "forward.out_bound is a float, but must be"),
    "noise": ({"modifier__std_dev": 2.0}, "weight_noise is 2.0"),
    "a part of a wrong kind": ({"forward": 3}, "forward is a int, but must be IOParameters"),
    "learnt clipping": ({"clip__type": "LEARNABLE"}, "clip.type is a str, but must be of"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_scheme_can_hold_is_one_sentence(changes, message, altered, tmp_path):
    (altered / "rpu_config").write_bytes(dill.dumps(lightning_config(32, **changes)))
    with pytest.raises(AnalogError) as caught:
        import_lightning(altered, tmp_path / "ours")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def edit(directory, change):
    path = directory / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


UP = "model.layers.0.mlp.up_proj"
SPOILT = {
    "no weight": (lambda s: s.pop(f"{UP}.weight"), "no matrix"),
    "no ranges": (
        lambda s: [s.pop(k) for k in list(s) if k.endswith("input_range")], "lacks input_range"
    ),
    "negative range": (lambda s: s[f"{UP}.input_range"].neg_(), "positive numbers"),
    "infinite range": (lambda s: s[f"{UP}.input_range"].fill_(float("inf")), "positive numbers"),
    "another layer": (lambda s: s.update({"other.weight": torch.ones(2, 2)}), "'other.weight'"),
    "another shape": (
        lambda s: s.update({"model.norm.weight": torch.ones(3)}), "of shape [3] instead of [64]"
    ),
    "no embedding": (lambda s: s.pop("model.embed_tokens.weight"), "lack model.embed_tokens"),
    "no tensor": (lambda s: s.update({"step": 3}), "holds 'step', a int"),
    "huge by stride": (
        lambda s: s.update({"model.norm.weight": torch.ones(1).expand(10**9)}), "instead of a plain"
    ),
    "learnt clipping unasked": (
        lambda s: s.update({f"{UP}.learnable_weight_clip": torch.ones(2, 96)}), "has learnable"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_weights_that_do_not_fit_are_one_sentence(change, message, altered, tmp_path):
    edit(altered, change)
    with pytest.raises(AnalogError) as caught:
        import_lightning(altered, tmp_path / "ours")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_a_raw_state_dictionary_is_refused_with_what_to_write(altered, tmp_path):
    config = lightning_config(32)
    torch.save(lightning_model("llama", config).state_dict(), altered / "pytorch_model.bin")
    with pytest.raises(AnalogError, match=r"torch\.save\(dict\(model\.state_dict\(\)\)"):
        import_lightning(altered, tmp_path / "ours")


def test_missing_and_doubled_files_are_one_sentence(altered, tmp_path):
    (altered / "model.safetensors").write_bytes(b"")
    with pytest.raises(AnalogError, match="holds both"):
        import_lightning(altered, tmp_path / "ours")
    (altered / "model.safetensors").unlink()
    weights = altered / "pytorch_model.bin"
    weights.rename(altered / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(AnalogError, match="lacks pytorch_model-00002-of-00002"):
        import_lightning(altered, tmp_path / "ours")
    (altered / "rpu_config").unlink()
    with pytest.raises(AnalogError, match="has no rpu_config"):
        import_lightning(altered, tmp_path / "ours")
    with pytest.raises(AnalogError, match="There is no directory"):
        import_lightning(tmp_path / "nowhere", tmp_path / "ours")
    with pytest.raises(AnalogError, match="not empty"):
        import_lightning(altered, altered)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("output", [".", ".."], ids=["itself", "around it"])
def test_the_model_is_never_replaced_by_what_is_made_of_it(output, altered, tmp_path):
    with pytest.raises(AnalogError, match="is or holds the checkpoint itself"):
        import_lightning(altered, altered / output, overwrite=True)
    assert (altered / "pytorch_model.bin").is_file()
    import_lightning(altered, tmp_path / "deeper" / "ours")
    with pytest.raises(AnalogError, match="is or holds the checkpoint itself"):
        to_lightning(tmp_path / "deeper" / "ours", tmp_path / "deeper", overwrite=True)
    load_checkpoint(tmp_path / "deeper" / "ours")


def test_other_faults_of_the_directory_are_one_sentence(altered, tmp_path):
    with pytest.raises(AnalogError, match="dtype is 'float8', but must be one of float32"):
        import_lightning(altered, tmp_path / "ours", dtype="float8")
    with pytest.raises(AnalogError, match="adc_bound is 'loud', but must be one of clean, noisy"):
        import_lightning(altered, tmp_path / "ours", adc_bound="loud")
    config = json.loads((altered / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "compressed-tensors"}}
    for spoilt, message in (
        (quantized, "says that the weights are quantized"),
        (config | {"num_hidden_layers": 1}, "which the model of config.json does not have"),
        (config | {"num_hidden_layers": 10**9}, "more than any model has"),
        (config | {"model_type": "bert"}, "no causal language model"),
        (config | {"auto_map": {"AutoConfig": "x.Y"}, "model_type": "x"}, "cannot be read"),
    ):
        (altered / "config.json").write_text(json.dumps(spoilt))
        with pytest.raises(AnalogError, match=message):
            import_lightning(altered, tmp_path / "ours")
    (altered / "config.json").write_text(json.dumps(config))
    (altered / "generation_config.json").write_text("{")
    with pytest.raises(AnalogError, match=r"generation_config\.json cannot be read"):
        import_lightning(altered, tmp_path / "ours")
    (altered / "adapter_config.json").write_text("{}")
    with pytest.raises(AnalogError, match="holds an adapter"):
        import_lightning(altered, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_command_imports_without_aihwkit_lightning(published, tmp_path):
    script = (
        "import sys\n"
        "sys.modules['aihwkit_lightning'] = None\n"
        "from optimum.commands.optimum_cli import main\n"
        "sys.argv = ['optimum-cli', *sys.argv[1:]]\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "analog", "import", published, tmp_path / "ours"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "15 analog layers, written to" in done.stdout
    assert load_checkpoint(tmp_path / "ours").config.tie_word_embeddings is False
