"""Estimates of memory and time against models, benchmarks, and the hours of the paper."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from analog_plugin import AnalogError
from analog_plugin.planning import GPUS, MODELS, Assumptions, Gpu, Job, ModelShape, estimate
from analog_plugin.planning.estimate import sent_bytes, step_operations, training_memory

ROOT = Path(__file__).parents[1]
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
#: As ``benchmarks/step.py`` trains.
STEP = Job(length=128, rows=4, chunk=256, sharding="ddp", checkpointing=False)


def config_of(shape, kind):
    return kind(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_shape_has_the_parameters_of_its_model(name):
    config = config_of(MODELS[name], Phi3Config if name == "4b" else LlamaConfig)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert MODELS[name].parameters == model.num_parameters()
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    assert MODELS[name].analog_weights == linear
    assert ModelShape.of_config(config.to_dict()) == MODELS[name]


def measured(dtype):
    """Of our step in the committed benchmark."""
    rows = json.loads((ROOT / "benchmarks/results/step.json").read_text())["rows"]
    return next(r for r in rows if r["peer"] == "analog-plugin" and r["dtype"] == dtype)


def test_operations_are_those_that_the_benchmark_counted():
    operations = 4 * 128 * step_operations(ModelShape.of_config(SMOLLM2), STEP)
    assert operations == pytest.approx(measured("bfloat16")["operations"], rel=0.02)


def test_memory_is_what_the_benchmark_measured_on_a_gpu():
    record = json.loads((ROOT / "benchmarks/results/gpu/step-half.json").read_text())
    given = record["settings"]["arguments"]
    assert (given["model"], given["teacher_dtype"]) == ("llama-3.2-1b", "bfloat16")
    model = dataclasses.replace(MODELS["1b"], blocks=given["layers"])
    job = Job(
        rows=given["rows"], length=given["length"], sharding="ddp", checkpointing=False
    )  # fmt: skip
    held = training_memory(model, 1, job)
    before = ("weights", "optimizer", "teacher")  # the benchmark counts what a step makes
    made = sum(size for name, size in held.items() if name not in before)
    peak = next(r["peak_bytes"] for r in record["rows"] if r["peer"] == "analog-plugin")
    assert made == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(("model", "hours"), [("1b", 90), ("4b", 230)])
def test_the_papers_trainings_take_hours_like_the_papers(model, hours):
    """96 V100, 20 B tokens, two epochs (arXiv 2505.09663)."""
    found = estimate(MODELS[model], GPUS["v100"], 96)
    assert found.fits
    assert 0.67 < found.training_hours / hours < 1.5


jobs = st.builds(
    Job,
    length=st.integers(1, 8192),
    rows=st.integers(1, 16),
    accumulation=st.integers(1, 8),
    sharding=st.sampled_from(["ddp", "fsdp"]),
    checkpointing=st.booleans(),
    keep_noise=st.booleans(),
    teacher=st.booleans(),
)
choices = {
    "model": st.sampled_from(list(MODELS.values())),
    "gpu": st.sampled_from([*GPUS.values()]),
}


@given(**choices, gpus=st.integers(2, 2000), job=jobs)
def test_more_gpus_never_train_more_slowly_or_need_more_memory_each(model, gpu, gpus, job):
    few, many = estimate(model, gpu, gpus, job), estimate(model, gpu, 2 * gpus, job)
    assert sum(many.memory.values()) <= sum(few.memory.values())
    within = 2 * gpus <= gpu.in_node or gpus > gpu.in_node  # a first step out of the node is slower
    assert not within or many.training_hours < few.training_hours
    assert many.step_seconds >= max(many.compute_seconds, many.network_seconds)


@given(**choices, gpus=st.integers(1, 2000), job=jobs)
def test_sharding_never_takes_more_memory(model, gpu, gpus, job):
    held = [
        sum(
            training_memory(model, gpus, Job(**(vars(job) | {"sharding": name})))[part]
            for part in ("weights", "gradients", "optimizer", "teacher")
        )
        for name in ("ddp", "fsdp")
    ]
    assert held == sorted(held, reverse=True)
    assert sent_bytes(model, 1, job) == 0


def test_cheaper_settings_are_cheaper():
    def of(**fields):
        return estimate(MODELS["8b"], GPUS["h100"], 8, Job(**fields))

    base = of()
    assert of(teacher=False).compute_seconds < base.compute_seconds
    assert of(teacher=False).memory["teacher"] == 0
    assert of(checkpointing=False).compute_seconds < base.compute_seconds
    part = "noisy and gathered weights"
    assert (
        of(checkpointing=False, keep_noise=False).memory[part]
        < of(checkpointing=False).memory[part]
    )
    assert of(accumulation=4).tokens_per_step == 4 * base.tokens_per_step


def test_a_model_that_does_not_fit_is_said_so():
    found = estimate(MODELS["70b"], GPUS["v100"], 1, Job(sharding="ddp"))
    assert not found.fits
    assert found.sampling_batch == 0 and found.sampling_hours == float("inf")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Gpu.named("tpu"), "gpu is 'tpu', but must be one of v100"),
        (lambda: ModelShape.of("2b"), "model is '2b', but must be one of 1b"),
        (lambda: ModelShape.of_config({"hidden_size": 0}), "hidden_size is 0"),
        (lambda: ModelShape.of_config(SMOLLM2 | {"vocab_size": "x"}), "vocab_size is 'x'"),
        (lambda: ModelShape.of_config({"n_embd": 768}), "hidden_size is None"),
        (lambda: Job(rows=0), "rows is 0"),
        (lambda: Job(tokens=float("nan")), "tokens is nan"),
        (lambda: Job(sharding="zero9"), "sharding is 'zero9'"),
        (lambda: Assumptions(efficiency=1.5), "efficiency is 1.5"),
        (lambda: Assumptions(analog=0.5), "analog is 0.5"),
        (lambda: estimate(MODELS["1b"], GPUS["h100"], 0), "gpus is 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(wrong, said):
    with pytest.raises(AnalogError, match=said):
        wrong()
