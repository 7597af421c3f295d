"""Perplexity, KL and agreement against a computation from full logits in float64."""

import copy
import math

import pytest
import torch
from tiny_models import VOCABULARY, tiny, token_ids
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from analog_plugin import AnalogScheme, calibrate_ranges, convert_to_analog, evaluate_noise
from analog_plugin.evaluation import Reference


def naive(model, tokens, original=None):
    with torch.no_grad():
        log_p = model(tokens).logits[:, :-1].double().log_softmax(-1)
        nll = -log_p.gather(-1, tokens[:, 1:, None])
        result = {"perplexity": math.exp(float(nll.mean()))}
        if original is not None:
            log_q = original(tokens).logits[:, :-1].double().log_softmax(-1)
            result["kl"] = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
            result["agreement"] = float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean())
    return result


def measured(model, tokens, noise=None, **options):
    return evaluate_noise(model, tokens, [noise], 1, **options).cells[0].metrics


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_metrics_equal_the_naive_ones(batch_size, model, original, tokens, reference):
    found = measured(model, tokens, reference=reference, batch_size=batch_size)
    expected = naive(model, tokens, original)
    assert expected["kl"] > 1e-3 and expected["agreement"] < 1, "the test must see a difference"
    assert found == pytest.approx(expected, rel=1e-5)


def test_metrics_under_noise_equal_the_naive_ones_of_the_programmed_model(
    model, original, tokens, reference
):
    from analog_plugin.evaluation.noise import programmed
    from analog_plugin.noise import resolve_noise

    with programmed(model, resolve_noise("pcm"), 0):
        expected = naive(model, tokens, original)
    found = measured(model, tokens, "pcm", reference=reference)
    assert found == pytest.approx(expected, rel=1e-5)


def test_without_a_reference_there_is_perplexity_alone(model, tokens):
    assert measured(model, tokens) == pytest.approx(naive(model, tokens), rel=1e-5)


def test_without_converters_the_model_is_its_original(model, original, tokens, reference):
    found = measured(model, tokens, reference=reference, converters=False)
    expected = {"perplexity": naive(original, tokens)["perplexity"], "kl": 0.0, "agreement": 1.0}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip


ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def wide(model):
    """The model with larger matrices, so that quantizing it shows well above fp32's resolution."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


BUILDERS = {
    "gpt2": lambda: tiny("gpt2"),
    "qwen2": lambda: tiny("qwen2"),
    "tied": lambda: tiny(tie=True),
    "softcapping": lambda: wide(
        Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0))
    ),
    "divided logits": lambda: wide(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))),
    "scaled logits": lambda: wide(
        CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25, **ENDS))
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_metrics_of_any_architecture_are_those_of_its_logits(name, tokens):
    torch.manual_seed(0)
    original = BUILDERS[name]().eval()
    model = convert_to_analog(copy.deepcopy(original), AnalogScheme(input_bits=5, tile_rows=16))
    calibrate_ranges(model, [{"input_ids": token_ids(4, 16)}])
    found = measured(model, tokens, reference=Reference.of(original, tokens, batch_size=2))
    expected = naive(model, tokens, original)
    assert expected["kl"] > 1e-3
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_hopeless_model_has_a_finite_perplexity(model, tokens):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert math.isfinite(measured(model, tokens)["perplexity"])


def test_the_reference_leaves_the_original_in_its_mode(original, tokens):
    original.train()
    original.model.norm.eval()
    Reference.of(original, tokens)
    assert original.training and not original.model.norm.training


def test_a_reference_in_bfloat16_serves_a_model_in_bfloat16(tokens):
    original = tiny(num_hidden_layers=1).bfloat16()
    model = convert_to_analog(copy.deepcopy(original), AnalogScheme())
    calibrate_ranges(model, [{"input_ids": token_ids(4, 16)}])
    found = measured(model, tokens, reference=Reference.of(original, tokens), batch_size=8)
    assert found == pytest.approx(naive(model, tokens, original), rel=1e-3)
