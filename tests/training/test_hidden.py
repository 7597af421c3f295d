"""Hidden states stand in for logits where, and only where, the head alone makes them."""

import copy

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
    LlamaModel,
    TrainingArguments,
)

from analog_plugin import AnalogError, AnalogScheme, AnalogTrainer, convert_to_analog
from analog_plugin.training import kl_divergence
from analog_plugin.training.hidden import HiddenStates

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
SPLIT = {
    "llama": tiny,
    "tied": lambda: tiny(tie=True),
    "qwen2": lambda: tiny("qwen2"),
    "phi3": lambda: tiny("phi3"),
    "gpt2": lambda: tiny("gpt2"),
}
WHOLE = {
    "softcapping": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
    "divided logits": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "scaled logits": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}


@pytest.fixture
def build():
    def make(name):
        torch.manual_seed(0)
        return (SPLIT | WHOLE)[name]().eval()

    return make


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_the_head_makes_the_models_logits(name, build):
    model, tokens = build(name), token_ids(2, 9)
    states = HiddenStates.of(model)
    with torch.no_grad():
        logits = states.head(states(input_ids=tokens))
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-5, atol=1e-6)
    assert states.split == (name in SPLIT)


@pytest.mark.parametrize("name", SPLIT)
def test_no_more_than_one_position_of_logits_is_made(name, build):
    model, seen = build(name), []
    states = HiddenStates.of(model)
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape[1])
    )
    states(input_ids=token_ids(2, 9))
    handle.remove()
    assert seen == [1]


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_a_model_changes_nothing(training, build):
    model = build("llama").train(training)
    hooks = len(model.base_model._forward_hooks)
    HiddenStates.of(model)(input_ids=token_ids())
    assert model.training == training and len(model.base_model._forward_hooks) == hooks


def test_a_model_without_a_head_is_refused():
    with pytest.raises(AnalogError, match="LlamaModel has no language-model head"):
        HiddenStates.of(LlamaModel(tiny().config))


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_the_training_loss_is_that_of_the_models_logits(name, build, make_trainer):
    trainer = make_trainer(model=build(name), scheme={"weight_noise": 0.0, "input_bits": 5})
    tokens = token_ids(2, 9)
    loss = trainer.compute_loss(trainer.model, {"input_ids": tokens})
    with torch.no_grad():
        student, teacher = (
            model(tokens).logits.reshape(-1, VOCABULARY).double()
            for model in (trainer.model, trainer.teacher)
        )
    torch.testing.assert_close(loss, kl_divergence(student, teacher).mean(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SPLIT)
def test_training_makes_no_more_than_a_chunk_of_logits_at_once(name, build, make_trainer):
    trainer, seen = make_trainer(model=build(name), own={"chunk": 5}), []
    for model in (trainer.model, trainer.teacher):
        model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: seen.append(output.shape[:-1].numel())
        )
    trainer.compute_loss(trainer.model, {"input_ids": token_ids(2, 9)})
    assert sorted(seen) == sorted([2, 2] + 2 * [5, 5, 5, 3])  # of 2 rows the last; then 18 tokens


def test_a_base_model_that_hides_its_states_is_read_by_its_logits(build):
    class Wrapped(torch.nn.Module):
        """As PEFT does it: the base model is itself a causal LM."""

        def __init__(self, inner):
            super().__init__()
            self.base_model = inner

        def forward(self, logits_to_keep=0, **inputs):
            return self.base_model(logits_to_keep=logits_to_keep, **inputs)

        def get_output_embeddings(self):
            return self.base_model.get_output_embeddings()

    model, tokens = build("llama"), token_ids()
    states = HiddenStates.of(Wrapped(model))
    assert not states.split
    assert torch.equal(states.head(states(input_ids=tokens)), model(tokens).logits)


def test_a_model_of_another_class_is_read_by_its_logits(build):
    states = HiddenStates.of(build("llama"))
    assert states.split and states.alike(build("llama")).split
    assert not states.alike(build("softcapping")).split


def test_small_logits_do_not_hide_what_stands_behind_the_head(build):
    model = build("softcapping").bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    assert not HiddenStates.of(model).split


def test_parts_in_another_mode_stay_in_it(build):
    model = build("llama").train()
    model.model.norm.eval()
    HiddenStates.of(model)
    assert model.training and model.model.layers.training and not model.model.norm.training


@pytest.mark.parametrize("chunk", [10, 512])
def test_a_head_that_is_analog_finds_its_range_from_every_position(chunk, tmp_path):
    model = tiny(num_hidden_layers=1)
    teacher = copy.deepcopy(model)
    scheme = AnalogScheme(range_init_in_training=True, weight_noise=0.0, clip_sigma=None)
    convert_to_analog(model, scheme, ignore=())
    hidden = []
    model.model.norm.register_forward_hook(lambda module, args, output: hidden.append(output))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False, learning_rate=1e-9,
    )  # fmt: skip
    trainer = AnalogTrainer(
        model, teacher=teacher, args=arguments, range_learning_rate=1e-9, chunk=chunk,
        train_dataset=[{"input_ids": row} for row in token_ids(8, 16)],
    )  # fmt: skip
    hidden.clear()
    trainer.train()
    expected = scheme.range_init_std * hidden[0].double().std()
    torch.testing.assert_close(
        model.lm_head.input_range.detach().double(), expected[None], rtol=1e-5, atol=0
    )
