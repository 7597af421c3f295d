"""The demo model, which is a real trained one: heavy runs, for `make test-slow`."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from analog_plugin import (
    calibrate_ranges,
    convert_to_analog,
    load_checkpoint,
    save_checkpoint,
    train_analog,
)
from analog_plugin.checkpoint import plain_view
from analog_plugin.checkpoint.save import plan_export
from analog_plugin.demo import resolve_model
from analog_plugin.layers.prefix import install_prefix, installed_prefix
from analog_plugin.presets import AFM
from analog_plugin.pretrained import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.slow
MODEL = "demo:smollm2-135m-instruct"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANALOG_PLUGIN_CACHE", str(tmp_path_factory.mktemp("demo")))
        yield resolve_model(MODEL)


def exported(source, scheme, steps):
    model = load_causal_lm(source, name=MODEL, dtype=torch.float32)
    training = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 2e-4}
    fields = {
        "scheme": scheme,
        "data": {"tokens": 8192, "batch_size": 64},
        "training": training | {"trainable": "analog", "bf16": "auto"} if steps else None,
        "evaluation": {"blocks": 4, "length": 256, "seeds": 3},
    }
    return train_analog(model, fields, tokenizer=load_tokenizer(source))


def kl(result, model, noise):
    return result.reports[model].mean(noise, "kl")


def test_the_prepared_start_is_far_better_and_everything_reloads(source, tmp_path):
    paper = {"preset": "AFM", "range_init_in_training": False, "range_init_batches": 16}
    old = exported(source, paper, 0)
    new = exported(source, "AFM_PLUS", 10)
    assert kl(new, "original", "none") < 0.2 * kl(old, "original", "none")
    assert kl(new, "original", "pcm") < 0.5 * kl(old, "original", "pcm")
    assert kl(new, "analog-trained", "pcm") < kl(new, "original", "pcm")
    assert sum(row["share"] for row in new.training["start"]["digital"]) <= 0.05

    save_checkpoint(new.model, tmp_path / "out", result=new)
    ids = torch.arange(100, 164).view(2, 32)
    with torch.no_grad():
        analog = load_checkpoint(tmp_path / "out")
        assert torch.equal(analog(ids).logits, new.model(ids).logits)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(
            plain(ids).logits, plain_view(new.model, plan_export(new.model))(ids).logits
        )


@pytest.fixture(scope="module")
def stored(source, tmp_path_factory):
    """The model with calibrated ranges as ``analog-fp``, and tokens to find scales on."""
    model = load_causal_lm(source, name=MODEL, dtype=torch.float32).eval()
    convert_to_analog(model, AFM)
    batches = [{"input_ids": torch.arange(100, 116)[None] * 7}]
    calibrate_ranges(model, batches)
    return save_checkpoint(model, tmp_path_factory.mktemp("stored") / "analog-fp"), batches


@pytest.mark.parametrize(
    ("profile", "options"),
    [
        ("w8a8", {}),
        ("w4-in-w8", {}),
        ("w4-in-w8", {"weight_scale": "mse"}),
        ("w4a8", {}),
        ("w3a8", {}),
        ("w2a8", {}),
        ("w8a8o8", {}),
        ("w4a8o8", {}),
        ("mixed-in-w8", {"average_bits": 4.5}),
    ],
)
def test_transformers_reads_every_digital_profile_bit_for_bit(stored, profile, options, tmp_path):
    directory, batches = stored
    model = load_checkpoint(directory)
    plan = plan_export(model, profile, batches=batches, **options)
    save_checkpoint(model, tmp_path / "out", profile=profile, plan=plan)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(1000, 1064).view(2, 32)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, plain_view(model, plan)(ids).logits)
    # Deriving changed nothing in the directory that it was derived from.
    save_checkpoint(model, tmp_path / "again")
    first, again = (
        load_file(path / "model.safetensors") for path in (directory, tmp_path / "again")
    )
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


def test_prompts_of_different_lengths_generate_in_a_batch_as_one_by_one(source):
    model = load_causal_lm(source, name=MODEL, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(source)
    tokenizer.padding_side = "left"
    install_prefix(model, (1,))
    assert installed_prefix(model).tokens == (1,)
    prompts = ["The capital of France is", "<|im_start|>user\nHello", "Water boils at a"]
    options = {"max_new_tokens": 12, "do_sample": False}
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for prompt, made in zip(prompts, together, strict=True):
        one = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**one, **options)[0, one["input_ids"].shape[1] :]
        assert made[: len(alone)].tolist() == alone.tolist()
