"""The same recipe through llm-compressor."""

import pytest
import torch
from llmcompressor import oneshot
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from analog_integrations.llmcompressor import AnalogModifier
from analog_plugin import AnalogError, load_checkpoint
from analog_plugin.layers import analog_layers
from optimum.analog import main_export


def tensors(directory):
    files = ("model.safetensors", "analog/analog_state.safetensors")
    return {key: t for file in files for key, t in load_file(directory / file).items()}


def assert_same(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == []


def run_oneshot(model_directory, recipe, out, **options):
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    oneshot(model=model, tokenizer=tokenizer, recipe=str(recipe), output_dir=str(out), **options)
    return model


@pytest.mark.parametrize("pipeline", ["datafree", "basic", "sequential"])
def test_a_dataset_gives_the_same_tensors_as_the_command(
    pipeline, model_directory, fields, write_recipe, tmp_path
):
    recipe = write_recipe(fields)
    rows = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    main_export(str(model_directory), tmp_path / "command", recipe, dataset=rows)
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    loader = DataLoader(examples, batch_size=2)
    run_oneshot(model_directory, recipe, tmp_path / "oneshot", dataset=loader, pipeline=pipeline)
    assert_same(tmp_path / "command", tmp_path / "oneshot")


def test_self_generated_data_gives_the_same_tensors_as_the_command(
    model_directory, fields, write_recipe, tmp_path
):
    recipe = write_recipe(fields)
    main_export(str(model_directory), tmp_path / "command", recipe)
    model = run_oneshot(model_directory, recipe, tmp_path / "oneshot")
    assert_same(tmp_path / "command", tmp_path / "oneshot")
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    loaded = load_checkpoint(tmp_path / "oneshot")
    with torch.no_grad():
        ids = torch.arange(3, 20)[None]
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_save_pretrained_writes_our_checkpoint_afterwards(
    model_directory, fields, write_recipe, tmp_path
):
    model = run_oneshot(model_directory, write_recipe(fields), tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert_same(tmp_path / "out", tmp_path / "again")
    assert dict(analog_layers(load_checkpoint(tmp_path / "again")))


def test_a_modifier_in_python_needs_no_recipe_file(model_directory, fields, tmp_path):
    modifier = AnalogModifier(**fields)
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    oneshot(model=model, recipe=modifier, output_dir=str(tmp_path / "out"))
    assert dict(analog_layers(load_checkpoint(tmp_path / "out")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "AFN"}, "no preset 'AFN'"),
        ({"scheme": {"input_bits": 17}}, "input_bits is 17"),
        ({"training": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"shceme": "AFM"}, "shceme"),
    ],
    ids=["preset", "bits", "training field", "field"],
)
def test_wrong_settings_are_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        AnalogModifier(**fields)


@pytest.mark.parametrize(
    ("training", "examples", "message"),
    [
        ({"optim": "sgdx"}, [{"input_ids": torch.ones(16, dtype=torch.long)}], "training: .*sgdx"),
        ({}, [{"input_ids": torch.full((16,), 128)}], "token id 128"),
        ({}, [{"words": torch.ones(16)}], "without input_ids"),
    ],
    ids=["training", "tokens", "no tokens"],
)
def test_what_does_not_fit_leaves_the_model_digital(
    training, examples, message, model_directory, fields, write_recipe, tmp_path
):
    fields["training"].update(training)
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    with pytest.raises(AnalogError, match=message):
        oneshot(
            model=model, recipe=str(write_recipe(fields)), output_dir=str(tmp_path / "out"),
            dataset=DataLoader(examples * 4), pipeline="datafree",
        )  # fmt: skip
    assert not dict(analog_layers(model)) and not (tmp_path / "out").exists()
