"""One run is one result: through the command's twin, through oneshot, and once more."""

import json

import pytest
import torch
from llmcompressor import oneshot
from safetensors.torch import load_file
from tiny_models import tiny
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from analog_integrations.llmcompressor import AnalogModifier
from analog_plugin import AnalogError, load_checkpoint
from analog_plugin.checkpoint.layout import verify_manifest
from analog_plugin.layers import analog_layers
from optimum.analog import AnalogModelForCausalLM, main_export


def tensors(directory):
    files = [*directory.glob("model*.safetensors"), *directory.glob("analog/*.safetensors")]
    return {(file.name, key): t for file in files for key, t in load_file(file).items()}


def differing(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys() and first
    return [key for key in first if not torch.equal(first[key], second[key])]


def token_rows(rows=8, length=16):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0))


def loader(rows, batch_size=2):
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    return DataLoader(examples, batch_size=batch_size)


@pytest.fixture
def compress(model_directory, tmp_path):
    def run(recipe, out, source=model_directory, prepare=None, **options):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if prepare is not None:
            prepare(model)
        tokenizer = AutoTokenizer.from_pretrained(model_directory)
        oneshot(
            model=model, tokenizer=tokenizer, recipe=str(recipe), output_dir=str(out), **options
        )
        return model

    return run


@pytest.fixture
def export(model_directory):
    def run(recipe, out, source=model_directory, **options):
        return main_export(str(source), out, recipe, **options)

    return run


def test_a_run_repeats_exactly_whatever_the_global_generator_holds(export, fields, tmp_path):
    torch.manual_seed(1)
    export(fields, tmp_path / "a")
    torch.manual_seed(2)
    torch.rand(100)
    export(fields, tmp_path / "b")
    assert differing(tmp_path / "a", tmp_path / "b") == []


def test_another_seed_gives_other_tensors(export, fields, tmp_path):
    export(fields, tmp_path / "a", seed=0)
    export(fields, tmp_path / "b", seed=1)
    assert differing(tmp_path / "a", tmp_path / "b")


def test_training_moves_weights_and_ranges(export, fields, tmp_path):
    export(fields, tmp_path / "a", no_train=True)
    export(fields, tmp_path / "b")
    moved = {key.rpartition(".")[2] for _, key in differing(tmp_path / "a", tmp_path / "b")}
    assert moved == {"weight", "input_range", "input_scale"}


@pytest.mark.parametrize("pipeline", ["datafree", "independent"])
def test_pipelines_that_need_no_dataset_train_on_generated_data(
    pipeline, compress, export, fields, write_recipe, tmp_path
):
    recipe = write_recipe(fields)
    export(recipe, tmp_path / "command")
    compress(recipe, tmp_path / "oneshot", pipeline=pipeline)
    assert differing(tmp_path / "command", tmp_path / "oneshot") == []


VARIANTS = {
    "another seed": {"seed": 9},
    "w8a8": {"deploy": {"profile": "w8a8"}},
    "analog parameters only": {"training": {"max_steps": 3, "trainable": "analog"}},
    "ranges initialised in training": {"scheme": {"preset": "AFM", "range_init_batches": 2}},
    "tied ranges": {
        "scheme": {"tile_rows": 32, "range_init_batches": 2,
                   "tie_ranges": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]}
    },
    "a better start": {
        "scheme": {"preset": "AFM_PLUS", "tile_rows": 32, "range_init_batches": 2}
    },
    "untied head": {"ignore": []},
    "no training": {"training": None},
    "accumulation": {
        "training": {"max_steps": 2, "per_device_train_batch_size": 2,
                     "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
def test_recipes_of_many_kinds(pipeline, variant, compress, export, fields, write_recipe, tmp_path):
    recipe = write_recipe(fields | VARIANTS[variant])
    export(recipe, tmp_path / "command", dataset=token_rows())
    compress(recipe, tmp_path / "oneshot", pipeline=pipeline, dataset=loader(token_rows()))
    assert differing(tmp_path / "command", tmp_path / "oneshot") == []


@pytest.mark.parametrize("name", ["phi3", "qwen2", "gpt2", "llama-tied"])
def test_other_architectures(
    name, compress, export, fields, write_recipe, model_directory, tmp_path
):
    base, _, tied = name.partition("-")
    tiny(base, bool(tied)).save_pretrained(tmp_path / "model")
    recipe = write_recipe(fields)
    export(recipe, tmp_path / "command", source=tmp_path / "model", dataset=token_rows())
    compress(
        recipe, tmp_path / "oneshot", source=tmp_path / "model", dataset=loader(token_rows()),
        pipeline="sequential",
    )  # fmt: skip
    assert differing(tmp_path / "command", tmp_path / "oneshot") == []


def test_padding_is_no_data(compress, export, fields, write_recipe, tmp_path):
    recipe = write_recipe(fields)
    rows = token_rows(10, 16)
    lengths = [16, 9, 7, 16, 3, 13, 16, 16, 16, 16]
    documents = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    packed = torch.cat(documents)
    packed = packed[: len(packed) // 16 * 16].view(-1, 16)
    examples = [
        {
            "input_ids": torch.cat([document, torch.zeros(16 - len(document), dtype=torch.long)]),
            "attention_mask": (torch.arange(16) < len(document)).long(),
        }
        for document in documents
    ]
    export(recipe, tmp_path / "command", dataset=packed)
    compress(
        recipe, tmp_path / "oneshot", dataset=DataLoader(examples, batch_size=2), pipeline="basic"
    )
    assert differing(tmp_path / "command", tmp_path / "oneshot") == []


def test_the_batches_of_the_loader_do_not_matter(compress, fields, write_recipe, tmp_path):
    recipe = write_recipe(fields)
    for size in (1, 8):
        data = loader(token_rows(), size)
        compress(recipe, tmp_path / f"{size}", dataset=data, pipeline="basic")
    assert differing(tmp_path / "1", tmp_path / "8") == []


def test_an_evaluation_changes_no_tensor_and_gives_the_same_figures(
    compress, export, fields, write_recipe, corpus, tmp_path
):
    export(fields, tmp_path / "plain")
    fields["evaluation"] = {"corpus": str(corpus), "blocks": 2, "length": 16, "seeds": 2}
    recipe = write_recipe(fields)
    export(recipe, tmp_path / "command")
    compress(recipe, tmp_path / "oneshot")
    assert differing(tmp_path / "plain", tmp_path / "command") == []
    assert differing(tmp_path / "command", tmp_path / "oneshot") == []
    first, second = (
        json.loads((tmp_path / name / "analog/training.json").read_text())["evaluation"]
        for name in ("command", "oneshot")
    )
    assert first == second and first


@pytest.mark.parametrize("given", [True, False], ids=["seed given", "the recipe's seed"])
def test_export_on_the_way_gives_the_same_model(given, export, fields, model_directory, tmp_path):
    fields["seed"] = 3
    options = {"recipe": fields} | ({"seed": 3} if given else {})
    export(fields, tmp_path / "out")
    model = AnalogModelForCausalLM.from_pretrained(model_directory, export=True, **options)
    ids = token_rows()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_checkpoint(tmp_path / "out")(ids).logits)


def test_flags_are_as_before_and_frozen_parameters_stay(
    compress, fields, write_recipe, model_directory, tmp_path
):
    def freeze(model):
        model.model.embed_tokens.weight.requires_grad_(False)
        model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
        model.train()

    fields["scheme"]["clip_sigma"] = None  # clipping acts on all analog weights
    model = compress(write_recipe(fields), tmp_path / "out", prepare=freeze)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"}
    assert not any(module.training for module in model.modules())  # ready for use
    assert all(parameter.grad is None for parameter in model.parameters())
    before = load_file(model_directory / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & frozen
    assert "model.layers.1.mlp.down_proj.weight" in changed


@pytest.mark.parametrize("training", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_the_model_is_not_left_wrapped(training, compress, fields, write_recipe, tmp_path):
    fields["training"].update(training)
    model = compress(write_recipe(fields), tmp_path / "out")
    ids = token_rows()
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.float32
        assert torch.equal(model(ids).logits, load_checkpoint(tmp_path / "out")(ids).logits)
    assert torch.is_grad_enabled()


def test_the_student_is_saved_and_the_teacher_is_not(
    compress, fields, write_recipe, model_directory, tmp_path
):
    model = compress(write_recipe(fields), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(model_directory / "model.safetensors")
    student = model.state_dict()
    assert all(torch.equal(saved[name], student[name]) for name in original)
    assert any(not torch.equal(saved[name], original[name]) for name in original)
    assert {name for name in saved if not name.endswith("input_scale")} == original.keys()
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 2
    verify_manifest(tmp_path / "out")


def test_save_pretrained_takes_what_hosts_give_it(compress, fields, write_recipe, tmp_path):
    model = compress(write_recipe(fields), tmp_path / "out")
    model.save_pretrained(str(tmp_path / "again"), save_compressed=True, safe_serialization=True)
    assert differing(tmp_path / "out", tmp_path / "again") == []
    verify_manifest(tmp_path / "again")
    assert json.loads((tmp_path / "again/analog/training.json").read_text())["steps"] == 2
    with pytest.raises(AnalogError, match="not empty"):
        model.save_pretrained(tmp_path / "again")


def test_the_recipe_in_the_checkpoint_is_in_force(compress, fields, write_recipe, tmp_path):
    compress(write_recipe(fields), tmp_path / "a", dataset=loader(token_rows()))
    recipe = tmp_path / "a" / "analog" / "recipe.yaml"
    compress(recipe, tmp_path / "b", dataset=loader(token_rows()))
    assert differing(tmp_path / "a", tmp_path / "b") == []


def test_a_dataset_shorter_than_a_row_is_refused(compress, fields, write_recipe, tmp_path):
    examples = [
        {"input_ids": torch.tensor([4, 5, 0]), "attention_mask": torch.tensor([1, 1, 0])},
        {"input_ids": torch.tensor([4, 5, 6]), "attention_mask": torch.tensor([1, 1, 1])},
    ]
    with pytest.raises(AnalogError, match="sequence_length"):
        compress(write_recipe(fields), tmp_path / "out", dataset=DataLoader(examples))
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_model_are_refused(compress, fields, write_recipe, tmp_path):
    with pytest.raises(AnalogError, match="at most 64"):
        compress(write_recipe(fields), tmp_path / "out", dataset=loader(token_rows(2, 65)))
    assert not (tmp_path / "out").exists()


WRONG = {
    "unknown preset": ({"scheme": "AFN"}, "no preset 'AFN'; did you mean 'AFM'"),
    "unknown scheme field": ({"scheme": {"clip_sgima": 1}}, "did you mean 'clip_sigma'"),
    "unknown field": ({"trainng": {}}, "trainng"),
    "unknown profile": ({"deploy": {"profile": "w9"}}, "no deploy profile 'w9'"),
    "unknown deploy field": ({"deploy": {"profil": "w8a8"}}, "did you mean 'profile'"),
    "unknown data field": ({"data": {"token": 1}}, "did you mean 'tokens'"),
    "unknown noise": ({"evaluation": {"noise": ["pmc"]}}, "did you mean 'pcm'"),
    "unknown loss field": ({"distillation": {"temprature": 1}}, "did you mean 'temperature'"),
    "temperature 0": ({"distillation": {"temperature": 0}}, "temperature is 0"),
    "no tokens": ({"data": {"tokens": 0}}, "tokens is 0"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "range rate 1": ({"training": {"range_learning_rate": 1}}, "range_learning_rate is 1"),
    "target no list": ({"targets": "Linear"}, "targets"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG.keys())
def test_the_modifier_refuses_wrong_settings_when_it_is_made(fields, message):
    with pytest.raises(ValueError) as caught:
        AnalogModifier(**fields)
    assert message in str(caught.value)


def test_the_modifiers_defaults_are_the_recipes(fields):
    from analog_plugin import AnalogRecipe

    assert AnalogModifier().analog_recipe() == AnalogRecipe()
    assert AnalogModifier(**fields).analog_recipe() == AnalogRecipe.parse(fields)


def test_two_runs_in_one_process_do_not_disturb_each_other(
    compress, fields, write_recipe, tmp_path
):
    recipe = write_recipe(fields)
    first = compress(recipe, tmp_path / "a")
    compress(write_recipe(fields | {"seed": 1}, "other.yaml"), tmp_path / "b")
    compress(recipe, tmp_path / "c")
    assert differing(tmp_path / "a", tmp_path / "c") == []
    first.save_pretrained(tmp_path / "d")
    assert differing(tmp_path / "a", tmp_path / "d") == []
    assert dict(analog_layers(first))
