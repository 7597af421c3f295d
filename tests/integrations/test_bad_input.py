"""Whatever is wrong with what was given: one sentence, and nothing is written."""

import json
import shutil

import pytest
import torch
import yaml
from tiny_models import tiny
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from analog_plugin import AnalogError
from analog_plugin.layers import analog_layers
from optimum.analog import AnalogModelForCausalLM, main_export


@pytest.fixture
def refuse(model_directory, fields, tmp_path):
    """Run the export, expect one sentence and nothing written beside what was there."""

    def run(*, model=model_directory, out=None, recipe=None, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(AnalogError) as caught:
            main_export(
                str(model), out or tmp_path / "out", fields if recipe is None else recipe, **options
            )
        assert sorted(tmp_path.rglob("*")) == before
        message = str(caught.value)
        assert message and "Traceback" not in message
        assert "\n" not in message.partition("write:\n")[0]
        return message

    return run


ARGUMENTS = {
    "unknown profile": ({"profile": "w9a9"}, "known: analog-fp, conductances"),
    "negative seed": ({"seed": -1}, "seed"),
    "huge seed": ({"seed": 2**40}, "seed"),
    "unknown dtype": ({"dtype": "float33"}, "float33"),
    "unknown task": ({"task": "fill-mask"}, "text-generation"),
    "unknown device": ({"device": "quantum"}, ""),
    "no recipe": ({"recipe": 5}, "recipe"),
}


@pytest.mark.parametrize(("options", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_wrong_argument(options, message, refuse):
    assert message in refuse(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there(refuse):
    refuse(device="cuda")


SCHEMES = {
    "bits 1": {"input_bits": 1},
    "bits 17": {"input_bits": 17},
    "bits as text": {"input_bits": "8"},
    "output bits 1": {"output_bits": 1},
    "negative sigma": {"clip_sigma": -1},
    "tile of 0 rows": {"tile_rows": 0},
    "fraction of a row": {"tile_rows": 1.5},
    "huge number": {"clip_sigma": 10**400},
    "unknown rescaling": {"rescale": "hadamard"},
    "converter without its partner": {"input_bits": None},
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_wrong_scheme(scheme, refuse, fields, write_recipe):
    fields["scheme"].update(scheme)
    recipe = write_recipe(fields)
    assert next(iter(scheme)) in refuse(recipe=recipe)
    refuse(recipe=fields)


TRAINING = {
    "batch of 0": {"per_device_train_batch_size": 0},
    "negative batch": {"per_device_train_batch_size": -2},
    "batch as text": {"per_device_train_batch_size": "many"},
    "no accumulation": {"gradient_accumulation_steps": 0},
    "steps as text": {"max_steps": "many"},
    "negative learning rate": {"learning_rate": -1.0},
    "learning rate as text": {"learning_rate": "fast"},
    "impossible momentum": {"adam_beta1": 2.0},
    "no evaluation set": {"eval_strategy": "steps"},
    "negative seed": {"seed": -1},
    "negative workers": {"dataloader_num_workers": -1},
    "unknown optimizer": {"optim": "sgdx"},
    "unknown scheduler": {"lr_scheduler_type": "zigzag"},
    "unknown scheduler argument": {"lr_scheduler_kwargs": {"zigzag": 1}},
    "sharding one process": {"fsdp": "full_shard"},
    "evaluation without a set": {"eval_on_start": True},
    "unknown argument of the checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"zigzag": 1},
    },
    "output directory": {"output_dir": "elsewhere"},
    "range rate 0": {"range_learning_rate": 0},
    "unknown choice": {"trainable": "none"},
}


@pytest.mark.parametrize("training", TRAINING.values(), ids=TRAINING.keys())
def test_a_wrong_training_argument(training, refuse, fields, write_recipe):
    fields["training"].update(training)
    # A missing file proves that nothing was read or trained before.
    message = refuse(recipe=write_recipe(fields), dataset="none.txt")
    assert "training" in message and "none.txt" not in message


def test_a_learning_rate_without_a_point_is_a_number_or_refused(
    model_directory, fields, write_recipe, tmp_path
):
    """YAML reads ``5e-5`` as text; it is what everybody writes."""
    recipe = write_recipe(fields)
    text = recipe.read_text()
    assert "learning_rate: 0.001" in text
    recipe.write_text(text.replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert "1e-3" in repr(yaml.safe_load(recipe.read_text()))
    try:
        main_export(str(model_directory), tmp_path / "out", recipe)
    except AnalogError as error:
        assert "learning_rate" in str(error)
        assert not (tmp_path / "out").exists()


RECIPES = {
    "field of the wrong kind": "a_stage: {a_modifiers: {AnalogModifier: {ignore: lm_head}}}",
    "body no mapping": "a_stage: {a_modifiers: {AnalogModifier: 5}}",
    "list of modifiers": "a_stage: {a_modifiers: [AnalogModifier]}",
    "misspelt modifier": "a_stage: {a_modifiers: {AnalogModifer: {}}}",
    "two of ours": (
        "a_stage: {a_modifiers: {AnalogModifier: {}}}\nb_stage: {b_modifiers: {AnalogModifier: {}}}"
    ),
    "negative seed": "a_stage: {a_modifiers: {AnalogModifier: {seed: -1}}}",
    "numbers as keys": "1: {2: {AnalogModifier: {}}}",
    "number": "5",
    "deep": "[" * 3000,
    "two documents": "a: 1\n---\nb: 2\n",
    "zero byte": "a: \0",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES.keys())
def test_a_wrong_recipe_file(text, refuse, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    assert "recipe" in refuse(recipe=tmp_path / "recipe.yaml")


def test_a_recipe_that_is_no_text(refuse, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\0")
    refuse(recipe=tmp_path / "recipe.yaml")
    refuse(recipe=tmp_path)


def test_a_recipe_executes_nothing(refuse, tmp_path):
    for tag in ("python/object/apply:pathlib.Path.touch", "python/object/apply:os.mkdir"):
        text = f"a_stage: !!{tag} [{str(tmp_path / 'executed')!r}]"
        (tmp_path / "recipe.yaml").write_text(text)
        refuse(recipe=tmp_path / "recipe.yaml")
    assert not (tmp_path / "executed").exists()


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def cut_weights(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_config(**changes):
    def change(directory):
        values = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(values))

    return change


MODELS = {
    "truncated weights": cut_weights,
    "garbage weights": write("model.safetensors", b"\xff" * 100),
    "empty weights": write("model.safetensors", b""),
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "no config": lambda d: (d / "config.json").unlink(),
    "garbage config": write("config.json", b"{"),
    "config a list": write("config.json", b"[]"),
    "unknown type": set_config(model_type="nonsense"),
    "size as text": set_config(hidden_size="wide"),
    "other size": set_config(hidden_size=32),
    "quantized": set_config(quantization_config={"quant_method": "compressed-tensors"}),
}


@pytest.mark.parametrize("damage", MODELS.values(), ids=MODELS.keys())
def test_a_model_that_cannot_be_read(damage, refuse, model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "model")
    damage(tmp_path / "model")
    refuse(model=tmp_path / "model")


@pytest.mark.parametrize("model", ["", "none", "nobody/nothing", "demo:nothing", "file"])
def test_a_model_that_is_not_there(model, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    refuse(model=model)


def test_a_tokenizer_that_cannot_be_read(refuse, model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert "tokenizer" in refuse(model=tmp_path / "model")


@pytest.mark.parametrize("setting", ["\ud800", "chat_template"])
def test_a_tokenizer_that_could_not_be_written_again(setting, refuse, model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: "\ud800"}))
    assert "tokenizer" in refuse(model=tmp_path / "model")


SMALL = {"vocab_size": 128, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertForMaskedLM(
            BertConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96, **SMALL)
        ),
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=128)
        ),
    ],
    ids=["bert", "t5"],
)
@pytest.mark.parametrize("ignore", ["lm_head", "cls.predictions.decoder"])
def test_a_model_that_is_not_causal(ignore, model, refuse, fields, tmp_path):
    """BERT does load as a causal model, and attends to both sides all the same."""
    model().save_pretrained(tmp_path / "model")
    fields["ignore"], fields["data"]["bos_token_id"] = [ignore], 1
    assert "causal" in refuse(model=tmp_path / "model")


def test_an_analog_checkpoint_is_no_model_to_start_from(refuse, model_directory, fields, tmp_path):
    for profile in ("analog-fp", "w8a8"):
        main_export(str(model_directory), tmp_path / profile, fields, profile=profile)
        refuse(model=tmp_path / profile)


DATA = {
    "empty.txt": (b"", "empty"),
    "blank.txt": (b" \n \n", "empty"),
    "short.txt": (b"w1 w2 w3", "shorter than one sequence"),
    "binary.txt": (b"\xff\xfe\0", ""),
    "broken.jsonl": (b"{nonsense", ""),
    "column.jsonl": (b'{"body": "w1 w2"}\n', "text_column: body"),
    "number.jsonl": (b'{"text": 5}\n', ""),
    "words.jsonl": (b'{"input_ids": ["a"]}\n' * 20, ""),
    "broken.parquet": (b"PAR1nonsense", ""),
    "data.csv": (b"text\nw1\n", "'.csv'"),
}


@pytest.mark.parametrize("name", DATA)
def test_a_dataset_that_cannot_be_used(name, refuse, tmp_path):
    content, message = DATA[name]
    (tmp_path / name).write_bytes(content)
    assert message in refuse(dataset=str(tmp_path / name))


ROWS = {
    "long rows": torch.ones(4, 65, dtype=torch.long),
    "no rows": torch.ones(0, 16, dtype=torch.long),
    "one dimension": torch.ones(16, dtype=torch.long),
    "beyond the vocabulary": torch.full((4, 16), 128),
    "negative": torch.full((4, 16), -1),
    "no ids": torch.rand(4, 16),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_rows_of_tokens_that_do_not_fit_the_model(rows, refuse):
    refuse(dataset=rows)


def test_a_tokenizer_of_another_model(refuse, model_directory, corpus, tmp_path):
    tiny(vocab_size=64).save_pretrained(tmp_path / "model")
    for path in model_directory.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    refuse(model=tmp_path / "model", dataset=str(corpus))


def test_a_first_token_beyond_the_vocabulary(refuse, fields):
    fields["data"]["bos_token_id"] = 128
    assert "bos_token_id" in refuse(recipe=fields)


EVALUATIONS = {
    "too many blocks": {"blocks": 1000, "length": 16},
    "too long": {"length": 65},
    "unknown noise": {"noise": ["pmc"]},
    "impossible noise": {"noise": [{"name": "gaussian", "sigma": -1}]},
    "unknown argument": {"noise": [{"name": "gaussian", "sgima": 1}]},
    "level no number": {"noise": ["pcm:much"]},
    "no seeds": {"seeds": 0},
    "missing corpus": {"corpus": "none.txt"},
}


@pytest.mark.parametrize("evaluation", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_an_evaluation_that_cannot_be_done(evaluation, refuse, fields, corpus):
    fields["evaluation"] = {"corpus": str(corpus), "length": 16} | evaluation
    refuse(recipe=fields)


def test_an_evaluation_without_a_tokenizer(refuse, fields, corpus, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    fields["evaluation"] = {"corpus": str(corpus), "length": 16}
    assert "tokenizer" in refuse(model=tmp_path / "model")


OUTPUTS = {
    "a file": lambda d: (d / "out").write_text("x"),
    "below a file": None,
    "full": lambda d: ((d / "out").mkdir(), (d / "out" / "precious").write_text("x")),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    case, refuse, tmp_path
):
    prepare = OUTPUTS[case] or OUTPUTS["a file"]
    prepare(tmp_path)
    out = tmp_path / "out" / "below" if OUTPUTS[case] is None else tmp_path / "out"
    assert str(tmp_path / "out") in refuse(out=out, model="nobody/nothing")


@pytest.mark.parametrize("out", [".", ""])
def test_an_output_without_a_name_is_used_or_refused(
    out, model_directory, fields, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    try:
        main_export(str(model_directory), out, fields)
    except AnalogError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert (tmp_path / "config.json").exists()


PROFILES = {
    "dynamic inputs": ("llama", {"input_range": "dynamic"}),
    "4-bit inputs": ("llama", {"input_bits": 4}),
    "Conv1D": ("gpt2", {}),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_profile_that_cannot_hold_the_model_is_refused_before_the_data_are_read(
    case, refuse, fields, tmp_path
):
    """Not after the training, which may have taken days."""
    name, scheme = PROFILES[case]
    tiny(name).save_pretrained(tmp_path / "model")
    fields["scheme"].update(scheme)
    message = refuse(
        model=tmp_path / "model", recipe=fields, profile="w8a8", dataset=str(tmp_path / "none.txt")
    )
    assert "write profile: analog-fp" in message


def test_a_model_with_a_questionable_generation_config_is_exported_or_refused(
    model_directory, fields, tmp_path
):
    """Hub models have them; transformers loads them and refuses to save them."""
    shutil.copytree(model_directory, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    values = json.loads(path.read_text()) | {"temperature": 0.6, "do_sample": False}
    path.write_text(json.dumps(values))
    try:
        main_export(str(tmp_path / "model"), tmp_path / "out", fields)
    except AnalogError as error:
        assert "generation" in str(error)
    else:
        assert dict(analog_layers(AnalogModelForCausalLM.from_pretrained(tmp_path / "out")))


def test_a_failed_overwrite_keeps_the_old_checkpoint(model_directory, fields, tmp_path):
    main_export(str(model_directory), tmp_path / "out", fields)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    fields["data"]["source"] = str(tmp_path / "none.txt")
    with pytest.raises(AnalogError):
        main_export(str(model_directory), tmp_path / "out", fields, overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "needs a recipe"), ({"recipe": {}, "torchdtype": 1}, "does not take torchdtype")],
)
def test_export_on_the_way_refuses_what_it_does_not_know(options, message, model_directory):
    with pytest.raises(AnalogError, match=message):
        AnalogModelForCausalLM.from_pretrained(model_directory, export=True, **options)
