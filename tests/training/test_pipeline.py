"""train_analog from a digital model to the table of results."""

import contextlib
import copy
import math
import signal

import pytest
import torch
from tiny_models import tiny, token_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from analog_plugin import AnalogError, save_checkpoint
from analog_plugin.data import evaluation_tokens
from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.layers import AnalogLinear, analog_layers, forward_state, model_scheme
from analog_plugin.training.pipeline import train_analog
from analog_plugin.training.trainer import AnalogTrainer

LENGTH = 16
DATA = {"sequence_length": LENGTH, "tokens": 8 * LENGTH}
SCHEME = {"tile_rows": 48, "clip_sigma": 3.0}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3", bos_token="w1")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(f"w{i * 7 % 125 + 3}" for i in range(400)))
    return str(path)


@pytest.fixture
def recipe(corpus):
    def make(**changes):
        values = {
            "scheme": SCHEME, "data": DATA,
            "training": {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
                         "disable_tqdm": True},
            "evaluation": {"noise": ["pcm", "gaussian:0.02"], "seeds": 2, "blocks": 3, "length": 12,
                           "corpus": corpus},
        }  # fmt: skip
        training = changes.pop("training", {})
        values["training"] = None if training is None else values["training"] | training
        return values | changes

    return make


@pytest.fixture
def model():
    return tiny(num_hidden_layers=1)


def weights(model):
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if not name.endswith("input_range")
    }


def changed(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_the_model_is_converted_trained_and_measured(model, recipe, tokenizer):
    before = weights(model)
    result = train_analog(model, recipe(), tokenizer=tokenizer)
    assert result.model is model and not model.training
    assert [name for name, _ in analog_layers(model)] and changed(before, weights(model))
    plain = result.reports.pop("loaded plainly")
    assert [(cell.noise, cell.seed) for cell in plain.cells] == [("none", None)]
    assert list(result.reports) == ["original, digital", "original", "analog-trained"]
    cells = [("none", None), *((n, s) for n in ("pcm", "gaussian:0.02") for s in range(2))]
    for report in result.reports.values():
        assert [(cell.noise, cell.seed) for cell in report.cells] == cells
        for cell in report.cells:
            assert cell.metrics.keys() == {"perplexity", "kl", "agreement"}
            assert all(math.isfinite(value) for value in cell.metrics.values())


PLUS = {"preset": "AFM_PLUS", "tile_rows": 32, "range_init_batches": 2}


def test_a_prepared_start_is_measured_beside_the_published_one(recipe, tokenizer):
    result = train_analog(tiny(), recipe(scheme=PLUS), tokenizer=tokenizer)
    rows = ["original, digital", "off the shelf", "original", "analog-trained", "loaded plainly"]
    assert list(result.reports) == rows
    kl = {name: report.mean("none", "kl") for name, report in result.reports.items()}
    assert kl["original, digital"] == pytest.approx(0, abs=1e-9)
    assert 0 < kl["original"] < kl["off the shelf"]


@pytest.mark.parametrize("scheme", [SCHEME, PLUS], ids=["tiles", "prefix"])
@pytest.mark.parametrize("profile", ["analog-fp", "w8a8", "w4a8o8"])
def test_what_plain_loaders_get_is_measured(scheme, profile, recipe, tokenizer, corpus, tmp_path):
    original = tiny()
    made = recipe(scheme=scheme, deploy={"profile": profile})
    result = train_analog(copy.deepcopy(original), made, tokenizer=tokenizer)
    save_checkpoint(result.model, tmp_path / "out", profile=profile, result=result)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = evaluation_tokens(tokenizer, 3, 12, corpus)
    found = fidelity(plain, tokens, Reference.of(original, tokens))
    assert found == result.reports["loaded plainly"].cells[0].metrics
    assert found["kl"] > 1e-6


def test_measuring_leaves_nothing_behind(recipe, tokenizer):
    measured = train_analog(tiny(), recipe(scheme=PLUS), tokenizer=tokenizer).model
    plain = train_analog(tiny(), recipe(scheme=PLUS, evaluation=None), tokenizer=tokenizer).model
    assert model_scheme(measured) == model_scheme(plain)
    first, second = measured.state_dict(), plain.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_digital_original_is_its_own_reference(model, recipe, tokenizer):
    report = train_analog(model, recipe(), tokenizer=tokenizer, train=False).reports
    clean = report["original, digital"].cells[0].metrics
    assert clean["kl"] == pytest.approx(0.0, abs=1e-9) and clean["agreement"] == 1.0
    assert report["original"].cells[0].metrics["kl"] > 1e-6
    assert report["original, digital"].mean("pcm", "kl") > 1e-3


def test_training_brings_the_model_nearer_to_its_original(model, recipe, tokenizer):
    result = train_analog(
        model,
        recipe(
            scheme=SCHEME | {"clip_sigma": None, "input_bits": 4},
            data=DATA | {"tokens": 64 * LENGTH},
            training={"max_steps": 60, "learning_rate": 2e-3, "per_device_train_batch_size": 8},
        ),
        tokenizer=tokenizer,
    )
    before, after = (result.reports[name] for name in ("original", "analog-trained"))
    assert after.mean("none", "kl") < 0.8 * before.mean("none", "kl")


def test_the_record_of_the_training_is_right(model, recipe, tokenizer):
    record = train_analog(model, recipe(seed=5), tokenizer=tokenizer).training
    layers = dict(analog_layers(model))
    assert record["steps"] == 3 and record["skipped_steps"] == 0 and record["seed"] == 5
    assert record["tokens"] == 3 * 4 * LENGTH
    assert record["dataset_tokens"] == 8 * LENGTH and record["sequence_length"] == LENGTH
    assert record["analog_layers"] == len(layers) == 7
    assert record["analog_weights"] == sum(layer.weight.numel() for layer in layers.values())
    assert record["seconds"].keys() == {
        "data",
        "calibration",
        "evaluation",
        "training",
        "export",
    }
    assert record["versions"]["torch"] == torch.__version__
    assert [entry["step"] for entry in record["loss_history"]] == [1, 2, 3]
    assert all(entry["loss"] > 0 for entry in record["loss_history"])


@pytest.mark.parametrize(
    ("training", "steps", "tokens"),
    [
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 3, 12),
        ({"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4}, 4, 16),
        ({"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3}, 3, 8),
        ({"max_steps": 2, "per_device_train_batch_size": 32}, 2, 16),
    ],
    ids=["accumulation", "whole epochs", "an incomplete last batch", "batch beyond the data"],
)  # fmt: skip
def test_tokens_are_those_that_were_trained_on(training, steps, tokens, model, recipe):
    record = train_analog(
        model, recipe(training=training, evaluation=None), dataset=token_ids(8, LENGTH)
    ).training
    assert (record["steps"], record["tokens"]) == (steps, tokens * LENGTH)


@pytest.mark.parametrize("options", [{"train": False}, {"training": None}])
def test_without_training_weights_are_untouched_and_ranges_set(options, model, recipe, tokenizer):
    before = weights(model)
    result = train_analog(
        model, recipe(**({"training": None} if "training" in options else {})),
        tokenizer=tokenizer, train=options.get("train", True),
    )  # fmt: skip
    assert changed(before, weights(model)) == []
    assert list(result.reports) == ["original, digital", "original", "loaded plainly"]
    assert (result.training["steps"], result.training["tokens"]) == (0, 0)
    assert result.training["loss_history"] == []
    for _, layer in analog_layers(model):
        assert (layer.input_range != 1).all()
    with torch.no_grad():
        assert model(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("trainable", ["all", "analog"])
def test_flags_are_afterwards_as_they_were(trainable, mode, model, recipe):
    model.train(mode)
    model.model.embed_tokens.requires_grad_(False)
    train_analog(model, recipe(evaluation=None, training={"trainable": trainable}))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["model.embed_tokens.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not model.training and forward_state(model).seed is None
    assert not any(module.training for module in model.modules())
    assert "forward" not in model.__dict__


def test_the_configuration_is_afterwards_as_it_was(model, recipe):
    """A checkpoint with ``use_cache: false`` would generate without its key-value cache."""
    before = [copy.deepcopy(c.to_dict()) for c in (model.config, model.generation_config)]
    train_analog(model, recipe(evaluation=None))
    assert [c.to_dict() for c in (model.config, model.generation_config)] == before


def test_gradient_checkpointing_is_off_again_afterwards(model, recipe):
    train_analog(model, recipe(evaluation=None, training={"gradient_checkpointing": True}))
    assert not model.is_gradient_checkpointing


def test_only_analog_layers_are_trained_where_asked(model, recipe):
    before = weights(model)
    train_analog(model, recipe(evaluation=None, training={"trainable": "analog"}))
    analog = {f"{name}.weight" for name, _ in analog_layers(model)}
    assert set(changed(before, weights(model))) == analog


def test_what_was_frozen_is_not_trained(model, recipe):
    model.model.embed_tokens.requires_grad_(False)
    before = weights(model)
    train_analog(model, recipe(evaluation=None))
    assert "model.embed_tokens.weight" not in changed(before, weights(model))


def test_bf16_leaves_no_wrapper_around_forward(model, recipe, tokenizer):
    result = train_analog(model, recipe(training={"bf16": True}), tokenizer=tokenizer)
    assert "forward" not in model.__dict__ and model.forward.__func__ is type(model).forward
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        assert model(token_ids()).logits.dtype == torch.float32
    assert result.training["steps"] == 3


@pytest.mark.parametrize("supported", [True, False])
def test_auto_trains_in_bfloat16_only_where_the_processor_has_it(
    supported, model, recipe, monkeypatch, caplog
):
    monkeypatch.setattr("analog_plugin.training.run.computes_bf16", lambda device: supported)
    result = train_analog(model, recipe(evaluation=None, training={"bf16": "auto"}))
    assert result.training["precision"] == ("bfloat16" if supported else "float32")
    assert not caplog.records


def test_emulated_bfloat16_is_warned_of(model, recipe, monkeypatch, caplog):
    monkeypatch.setattr("analog_plugin.training.run.computes_bf16", lambda device: False)
    result = train_analog(model, recipe(evaluation=None, training={"bf16": True}))
    assert "write bf16: auto" in caplog.text
    assert result.training["precision"] == "bfloat16"


def test_a_bf16_model_keeps_its_type_and_fp32_ranges(model, recipe, tokenizer):
    train_analog(model.bfloat16(), recipe(), tokenizer=tokenizer)
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if name.endswith("input_range") else torch.bfloat16
        assert parameter.dtype == wanted, name


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_papers_recipe_finds_its_ranges_in_training(evaluated, model, recipe, tokenizer):
    values = recipe(scheme="AFM") if evaluated else recipe(scheme="AFM", evaluation=None)
    result = train_analog(model, values, tokenizer=tokenizer)
    assert result.training["steps"] == 3
    assert ("calibration" in result.training["seconds"]) == evaluated
    for _, layer in analog_layers(model):
        assert int(layer.range_batches) == 3 and (layer.input_range > 0).all()
    with torch.no_grad():
        assert model(token_ids()).logits.isfinite().all()


def test_the_same_seed_gives_the_same_model_and_another_does_not(recipe):
    def run(seed):
        model = tiny(num_hidden_layers=1)
        train_analog(model, recipe(evaluation=None, seed=seed), dataset=token_ids(8, LENGTH))
        return dict(model.named_parameters())

    first = run(1)
    assert changed(first, run(1)) == []
    assert changed(first, run(2))


def test_how_noise_is_drawn_and_kept_is_a_setting_of_the_training(recipe):
    def run(**training):
        model = tiny(num_hidden_layers=1)
        training |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        made = recipe(evaluation=None, training=training)
        train_analog(model, made, dataset=token_ids(8, LENGTH))
        return dict(model.named_parameters())

    usual = run()
    assert changed(usual, run(keep_noise=False)) == []
    assert changed(usual, run(noise_per="step"))


def test_the_state_of_the_global_generator_does_not_matter(recipe, tokenizer):
    def run(seed):
        model = tiny(num_hidden_layers=1)
        torch.manual_seed(seed)
        reports = train_analog(model, recipe(), tokenizer=tokenizer).reports
        return dict(model.named_parameters()), {n: r.to_dict() for n, r in reports.items()}

    (first, reports), (second, other) = run(1), run(2)
    assert changed(first, second) == [] and reports == other


@pytest.mark.parametrize("kind", ["rows", "file", "source"])
def test_training_tokens_may_be_given(kind, model, recipe, tokenizer, corpus):
    if kind == "source":
        data, dataset = DATA | {"source": corpus}, None
    else:
        data, dataset = DATA, token_ids(8, LENGTH) if kind == "rows" else corpus
    result = train_analog(
        model, recipe(data=data, evaluation=None), tokenizer=tokenizer, dataset=dataset
    )
    assert result.training["dataset_tokens"] == 8 * LENGTH


def test_rows_that_are_given_set_their_own_length(model, recipe):
    """The default length of 128 is more than this model allows, but is not used."""
    record = train_analog(
        model, recipe(data={}, evaluation=None), dataset=token_ids(8, 10)
    ).training
    assert record["sequence_length"] == 10


def test_settings_decide_what_is_converted(model, recipe):
    values = recipe(evaluation=None, training=None, ignore=["lm_head", "down_proj"])
    train_analog(model, values | {"targets": ["*.mlp.*"]})
    names = [name for name, _ in analog_layers(model)]
    assert names == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert all(isinstance(layer, AnalogLinear) for _, layer in analog_layers(model))


def digital(model):
    return next(analog_layers(model), None) is None


@pytest.mark.parametrize(
    ("changes", "dataset", "message"),
    [
        ({"data": DATA | {"sequence_length": 65}}, None, "sequence_length is 65"),
        ({"training": {"max_step": 3}}, None, "did you mean 'max_steps'"),
        ({"scheme": "AFN"}, None, "no preset 'AFN'"),
    ],
    ids=["sequences too long", "unknown field", "unknown preset"],
)
def test_what_does_not_fit_is_refused_before_the_model_is_changed(
    changes, dataset, message, model, recipe, tokenizer
):
    with pytest.raises(AnalogError, match=message):
        train_analog(model, recipe(**changes), tokenizer=tokenizer, dataset=dataset)
    assert digital(model)


def test_evaluation_without_a_tokenizer_is_refused_before_the_model_is_changed(model, recipe):
    with pytest.raises(AnalogError, match=r"needs a tokenizer; .* write evaluation: null"):
        train_analog(model, recipe())
    assert digital(model)


@pytest.mark.parametrize("changes", [{"blocks": 1000}, {"length": 65}, {"corpus": "missing.txt"}])
def test_an_evaluation_that_cannot_be_is_refused_before_the_model_is_changed(
    changes, model, recipe, tokenizer
):
    values = recipe()
    values["evaluation"] |= changes
    with pytest.raises(AnalogError):
        train_analog(model, values, tokenizer=tokenizer)
    assert digital(model)


@pytest.mark.parametrize(
    "training",
    [
        {"lr_scheduler_type": "nope"},
        {"learning_rate": "abc"},
        {"per_device_train_batch_size": "abc"},
        {"per_device_train_batch_size": 0},
    ],
    ids=["unknown schedule", "rate of text", "batch of text", "no batch"],
)
def test_wrong_training_values_are_refused_before_the_model_is_changed(training, model, recipe):
    with pytest.raises(AnalogError):
        train_analog(model, recipe(evaluation=None, training=training))
    assert digital(model)


@pytest.mark.parametrize("shape", [(0, LENGTH), (LENGTH,)])
def test_a_dataset_of_the_wrong_shape_is_refused(shape, model, recipe):
    with pytest.raises(AnalogError, match=r"must be token ids \[rows, length\]"):
        train_analog(model, recipe(evaluation=None), dataset=torch.zeros(shape, dtype=torch.long))


def test_an_error_in_training_leaves_flags_as_they_were(model, recipe, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(AnalogTrainer, "compute_loss", fail)
    model.model.embed_tokens.requires_grad_(False)
    training = {"gradient_checkpointing": True, "trainable": "analog"}
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        train_analog(model, recipe(evaluation=None, training=training))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["model.embed_tokens.weight"]
    assert not model.training and "forward" not in model.__dict__
    assert not model.is_gradient_checkpointing and model.config.to_dict() == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((8, LENGTH), 10_000), "token id 10000"),
        (torch.ones(2, 65, dtype=torch.long), "at most 64"),
    ],
    ids=["beyond the vocabulary", "too long"],
)
def test_rows_that_do_not_fit_leave_the_model_digital(rows, message, model, recipe):
    before, modules = weights(model), [type(module) for module in model.modules()]
    with pytest.raises(AnalogError, match=message):
        train_analog(model, recipe(evaluation=None), dataset=rows)
    assert [type(module) for module in model.modules()] == modules
    assert changed(before, weights(model)) == [] and not model._forward_pre_hooks


def test_a_rehearsal_leaves_no_trace(model, recipe):
    """Gradient checkpointing would leave a hook on the embedding."""
    training = {"gradient_checkpointing": True, "optim": "adamw_torch"}
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(AnalogError, match="at most 64"):
        train_analog(
            model, recipe(evaluation=None, training=training),
            dataset=torch.ones(2, 65, dtype=torch.long),
        )  # fmt: skip
    assert model.config.to_dict() == before and not model.is_gradient_checkpointing
    assert not any(module._forward_hooks for module in model.modules())


def test_numbers_written_as_text_are_numbers(model, recipe):
    result = train_analog(model, recipe(evaluation=None, training={"learning_rate": "1e-3"}))
    assert result.recipe.training["learning_rate"] == 1e-3 and result.training["steps"] == 3


def test_no_whole_batch_is_refused(model, recipe):
    training = {"dataloader_drop_last": True, "per_device_train_batch_size": 9}
    with pytest.raises(AnalogError, match="write dataloader_drop_last: false"):
        train_analog(
            model, recipe(evaluation=None, training=training), dataset=token_ids(8, LENGTH)
        )


def test_an_interrupt_that_a_library_swallows_ends_the_training_all_the_same(
    model, recipe, tokenizer, monkeypatch
):
    """As C code does that clears every exception."""
    # Where the tests themselves run in the background, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = []
    real = AnalogTrainer.compute_loss

    def swallowing(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 2:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(AnalogTrainer, "compute_loss", swallowing)
    settings = recipe(training={"max_steps": 50})
    try:
        with pytest.raises(KeyboardInterrupt):
            train_analog(model, settings, tokenizer=tokenizer)
        assert steps == [0, 1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
