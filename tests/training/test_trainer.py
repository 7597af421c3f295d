"""Training: what each optimizer step does and does not do."""

import copy

import pytest
import torch
from tiny_models import VOCABULARY, tiny, token_ids
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from analog_plugin import (
    AnalogCallback,
    AnalogError,
    AnalogScheme,
    AnalogTrainer,
    calibrate_ranges,
    convert_to_analog,
)
from analog_plugin.layers import analog_layers
from analog_plugin.ops.clip import peak_to_sigma
from analog_plugin.scheme import FUSED_GROUPS
from analog_plugin.training import TrainingDiverged, kl_divergence
from analog_plugin.training.callback import clip_alpha


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_training_brings_the_model_nearer_to_its_teacher(name, make_trainer):
    trainer = make_trainer(name, max_steps=30, learning_rate=3e-3)
    trainer.train()
    assert sum(losses(trainer)[-5:]) < 0.7 * sum(losses(trainer)[:5])


def test_a_seed_gives_the_same_weights_and_another_does_not(make_trainer, weights):
    def train(**arguments):
        trainer = make_trainer(**arguments)
        trainer.train()
        return weights(trainer.model)

    first = train()
    assert_equal(first, train())
    for other in (train(own={"noise_seed": 5}), train(seed=1, own={"noise_seed": 0})):
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(first[name], other[name])


def test_the_teacher_is_never_changed(make_trainer, weights):
    trainer = make_trainer()
    before = weights(trainer.teacher)
    trainer.train()
    assert_equal(before, weights(trainer.teacher))
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_neither_loss_nor_clip_counts(side, make_trainer):
    trainer = make_trainer(scheme={"weight_noise": 0.0})
    rows, pad = token_ids(2, 9), torch.zeros(2, 4, dtype=torch.long)
    ones = torch.ones_like(rows)
    joined = [rows, pad] if side == "right" else [pad, rows]
    masks = [ones, pad] if side == "right" else [pad, ones]
    padded = {"input_ids": torch.cat(joined, 1), "attention_mask": torch.cat(masks, 1)}
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    trainer.model.train()
    plain = trainer.compute_loss(trainer.model, {"input_ids": rows})
    counts = [layer.clip_counts.clone() for _, layer in analog_layers(trainer.model)]
    for _, layer in analog_layers(trainer.model):
        layer.clip_counts.zero_()
    loss = trainer.compute_loss(trainer.model, padded | {"position_ids": positions})
    torch.testing.assert_close(loss, plain, rtol=2e-3, atol=1e-5)  # attention sums in another order
    for (_, layer), count in zip(analog_layers(trainer.model), counts, strict=True):
        assert torch.equal(layer.clip_counts[:, 1], count[:, 1])


def test_positions_without_a_label_do_not_count(make_trainer):
    trainer = make_trainer(scheme={"weight_noise": 0.0})
    rows = token_ids(2, 9)
    labels = rows.clone()
    labels[:, :5] = -100
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, {"input_ids": rows, "labels": labels})
    with torch.no_grad():
        student, teacher = (
            model(rows).logits[:, 4:8].reshape(-1, VOCABULARY)
            for model in (trainer.model, trainer.teacher)
        )
        kl = kl_divergence(student, teacher)
    torch.testing.assert_close(loss, kl.mean(), rtol=1e-4, atol=1e-6)


def test_accumulation_equals_a_larger_batch(make_trainer, weights):
    def train(size, steps):
        trainer = make_trainer(
            scheme={"weight_noise": 0.0}, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_steps=2, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        return losses(trainer), weights(trainer.model)

    (loss, large), (accumulated_loss, accumulated) = train(8, 1), train(2, 4)
    assert loss == pytest.approx(accumulated_loss, rel=1e-3)
    for key in large:
        torch.testing.assert_close(large[key], accumulated[key], rtol=1e-3, atol=1e-5)


def test_ranges_have_a_group_of_their_own_without_weight_decay(make_trainer):
    trainer = make_trainer(weight_decay=0.1, own={"range_learning_rate": 0.007})
    groups = trainer.create_optimizer().param_groups
    ranges = {id(layer.input_range) for _, layer in analog_layers(trainer.model)}
    own = [g for g in groups if {id(p) for p in g["params"]} & ranges]
    assert len(own) == 1 and {id(p) for p in own[0]["params"]} == ranges
    assert own[0]["lr"] == 0.007 and own[0]["weight_decay"] == 0.0
    assert all(layer.input_range.requires_grad for _, layer in analog_layers(trainer.model))


def test_ranges_do_not_count_into_the_gradient_norm(make_trainer):
    class HugeRangeGradients(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for _, layer in analog_layers(model):
                layer.input_range.register_hook(lambda grad: grad + 1e6)

    norms = []
    for callbacks in ([], [HugeRangeGradients()]):
        trainer = make_trainer(max_steps=1, own={"callbacks": callbacks})
        trainer.train()
        norms.append(next(e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e))
    assert norms[0] == norms[1]


def test_a_range_changes_relative_to_itself_and_stays_positive(make_trainer):
    class Push(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for _, layer in analog_layers(model):
                layer.input_range.register_hook(lambda grad: torch.ones_like(grad))

    trainer = make_trainer(max_steps=1, own={"callbacks": [Push()], "range_learning_rate": 0.01})
    before = {n: layer.input_range.detach().clone() for n, layer in analog_layers(trainer.model)}
    trainer.train()
    for name, layer in analog_layers(trainer.model):
        ratio = layer.input_range.data / before[name]
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.99), rtol=1e-4, atol=0)
    trainer = make_trainer(max_steps=40, own={"callbacks": [Push()], "range_learning_rate": 0.9})
    trainer.train()
    for _, layer in analog_layers(trainer.model):
        assert bool((layer.input_range > 0).all()) and bool(layer.input_range.isfinite().all())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_decay_is_applied_once_per_optimizer_step(accumulation, make_trainer):
    """With SGD the update is the gradient: only the decay, since nothing clips."""
    trainer = make_trainer(
        scheme={"range_init": "max"}, max_steps=1, optim="sgd", per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation, own={"range_learning_rate": 0.5},
    )  # fmt: skip
    for _, layer in analog_layers(trainer.model):
        layer.set_input_range(layer.input_range.detach() * 2)
    before = {n: layer.input_range.detach().clone() for n, layer in analog_layers(trainer.model)}
    trainer.train()
    for name, layer in analog_layers(trainer.model):
        old = before[name]
        torch.testing.assert_close(layer.input_range.data, old * (1 - 0.5 * 0.01 * old))


def test_a_constant_clip_holds_after_training(make_trainer):
    trainer = make_trainer(scheme={"clip_sigma": 2.0}, max_steps=2, learning_rate=1e-6)
    trainer.train()
    for _, layer in analog_layers(trainer.model):
        assert peak_to_sigma(layer.tile_weight) <= 2.0 * 1.15  # clipping shrinks the sigma itself


def test_an_annealed_clip_starts_where_nothing_is_clipped_and_ends_at_its_target():
    scheme = AnalogScheme(clip_sigma=2.0, clip_schedule="anneal", clip_anneal_share=0.5)
    assert clip_alpha(scheme, 8.0, 0.0) == pytest.approx(8.0)
    assert clip_alpha(scheme, 8.0, 0.25) == pytest.approx(4.0)
    assert clip_alpha(scheme, 8.0, 0.5) == clip_alpha(scheme, 8.0, 1.0) == pytest.approx(2.0)
    assert clip_alpha(scheme, 1.5, 0.0) == 2.0
    assert clip_alpha(scheme.replace(clip_schedule="constant"), 8.0, 0.0) == 2.0
    assert clip_alpha(scheme.replace(clip_sigma=None), 8.0, 0.0) is None


class Poison(TrainerCallback):
    """Makes the gradients of the given steps not finite."""

    def __init__(self, steps):
        self.steps, self.before = steps, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        parameter = model.lm_head.weight
        if state.global_step in self.steps:
            self.before[state.global_step] = {
                k: v.detach().clone() for k, v in model.named_parameters()
            }
            handle = parameter.register_hook(lambda grad: (handle.remove(), grad * float("nan"))[1])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = state.global_step - 1
        if step in self.steps:
            assert_equal(self.before[step], {k: v.detach() for k, v in model.named_parameters()})
            self.before[step] = None


def test_a_step_that_is_not_finite_is_skipped_and_counted(make_trainer):
    poison = Poison({1, 2})
    trainer = make_trainer(max_steps=5, own={"callbacks": [poison]}, scheme={"clip_sigma": 2.0})
    trainer.train()
    assert trainer.analog_callback.skipped_steps == 2
    assert poison.before == {1: None, 2: None}
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_run_that_diverged_stops_with_a_message(make_trainer):
    trainer = make_trainer(max_steps=20, own={"callbacks": [Poison(set(range(2, 20)))]})
    with pytest.raises(TrainingDiverged, match="not finite in 10 steps in a row; write a smaller"):
        trainer.train()


def test_gradient_checkpointing_gives_the_same_weights(make_trainer, weights):
    def train(**arguments):
        scheme = {"range_init_in_training": True, "range_init_batches": 2}
        trainer = make_trainer(scheme=scheme, **arguments)
        trainer.train()
        assert all(int(layer.range_batches) == 2 for _, layer in analog_layers(trainer.model))
        return weights(trainer.model)

    assert_equal(train(), train(gradient_checkpointing=True))


def test_the_callback_serves_an_ordinary_trainer(tmp_path):
    model = tiny(num_hidden_layers=1)
    scheme = AnalogScheme(clip_sigma=2.0, range_init_in_training=True, range_init_batches=2)
    convert_to_analog(model, scheme)
    callback = AnalogCallback(seed=3)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 16)]
    trainer = Trainer(model, args=arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert all(int(layer.range_batches) == 2 for _, layer in analog_layers(model))
    assert all(peak_to_sigma(layer.tile_weight) < 2.4 for _, layer in analog_layers(model))


def test_a_resumed_run_ends_like_the_unbroken_one(make_trainer, weights):
    scheme = {"tie_ranges": FUSED_GROUPS, "clip_sigma": 2.0, "clip_schedule": "anneal"}
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    unbroken = make_trainer(scheme=scheme, **options)
    unbroken.train()
    resumed = make_trainer(scheme=scheme, **options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert_equal(weights(unbroken.model), weights(resumed.model))
    assert unbroken.analog_callback.clip_start == resumed.analog_callback.clip_start


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_bf16_training_brings_the_model_nearer_to_its_teacher(name, make_trainer):
    trainer = make_trainer(name, max_steps=30, learning_rate=3e-3, bf16=True)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert sum(losses(trainer)[-5:]) < 0.7 * sum(losses(trainer)[:5])


def test_what_cannot_be_trained_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(AnalogError, match="no analog layer"):
        AnalogTrainer(model, teacher=tiny())
    convert_to_analog(model, AnalogScheme())
    with pytest.raises(AnalogError, match="same object"):
        AnalogTrainer(model, teacher=model)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    options = {"teacher": tiny(), "args": arguments, "callbacks": [AnalogCallback(seed=1)]}
    with pytest.raises(AnalogError, match=r"noise_seed.* AnalogCallback\(seed=3\) alone"):
        AnalogTrainer(model, noise_seed=3, **options)
    arguments._n_gpu = 2
    with pytest.raises(AnalogError, match=r"sees 2 GPUs.*torchrun --nproc-per-node 2"):
        AnalogTrainer(model, **options)


def test_a_callback_that_was_given_is_the_one_at_work(make_trainer):
    own = AnalogCallback(seed=1)
    trainer = make_trainer(own={"callbacks": [own]})
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, AnalogCallback)]
    assert found == [own] and trainer.analog_callback is own


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    ],
    ids=["softcapping", "logit scaling"],
)
def test_models_that_do_more_behind_their_head_get_the_loss_of_their_logits(build, make_trainer):
    torch.manual_seed(0)
    model = build().eval()
    trainer = make_trainer(model=model, scheme={"weight_noise": 0.0})
    rows = token_ids(2, 9)
    loss = trainer.compute_loss(trainer.model, {"input_ids": rows})
    with torch.no_grad():
        kl = kl_divergence(trainer.model(rows).logits.flatten(0, 1),
                           trainer.teacher(rows).logits.flatten(0, 1))  # fmt: skip
    torch.testing.assert_close(loss, kl.mean(), rtol=1e-4, atol=1e-6)


def test_calibration_ignores_padding_and_merges_batches():
    model = convert_to_analog(tiny(), AnalogScheme(range_init="max", tile_rows=32))
    rows = token_ids(4, 12)
    alone = calibrate_ranges(model, [{"input_ids": rows}])
    split = calibrate_ranges(model, [{"input_ids": rows[:1]}, {"input_ids": rows[1:]}])
    mask = torch.ones_like(rows)
    wild = torch.cat([rows, torch.full((4, 3), 7)], 1)
    masked = calibrate_ranges(
        model, [{"input_ids": wild, "attention_mask": torch.cat([mask, mask[:, :3] * 0], 1)}]
    )
    for name in alone:
        torch.testing.assert_close(alone[name], split[name], rtol=1e-5, atol=0)
        torch.testing.assert_close(alone[name], masked[name], rtol=1e-5, atol=0)


def test_calibration_without_data_is_an_error():
    model = convert_to_analog(tiny(), AnalogScheme())
    with pytest.raises(AnalogError, match="calibration data is empty"):
        calibrate_ranges(model, [])
    with pytest.raises(AnalogError, match=r"ranges of .* were never set"):
        copy.deepcopy(model)(token_ids())


class _Recorder(TrainerCallback):
    """The first layer's noisy weights in each micro-batch, read off its products."""

    def __init__(self, model):
        self.layer = next(layer for _, layer in analog_layers(model))
        self.seen = []
        self.layer.register_forward_hook(self._note)

    def _note(self, layer, args, output):
        if not layer.training or getattr(self, "busy", False):
            return
        self.busy = True
        with torch.no_grad():
            self.seen.append(layer(torch.eye(layer.in_features)))
        self.busy = False


@pytest.mark.parametrize("noise_per", ["forward", "step"])
def test_noise_per_step_is_shared_by_its_micro_batches_alone(noise_per, make_trainer):
    trainer = make_trainer(
        gradient_accumulation_steps=2, max_steps=2, learning_rate=0.0, own={"noise_per": noise_per}
    )
    recorder = _Recorder(trainer.model)
    trainer.train()
    a, b, c, d = recorder.seen
    shared = noise_per == "step"
    assert torch.equal(a, b) == torch.equal(c, d) == shared
    assert not torch.equal(a, c)


def test_noise_that_is_drawn_again_trains_the_same_model(make_trainer, weights):
    def train(keep_noise):
        trainer = make_trainer(own={"keep_noise": keep_noise})
        trainer.train()
        return weights(trainer.model)

    assert_equal(train(True), train(False))


def test_settings_of_the_noise_beside_a_callback_are_refused(make_trainer):
    callbacks = [AnalogCallback()]
    with pytest.raises(AnalogError, match=r"write AnalogCallback\(noise_per='step'\) alone"):
        make_trainer(own={"callbacks": callbacks, "noise_per": "step"})
    with pytest.raises(AnalogError, match="must be 'forward' or 'step'"):
        AnalogCallback(noise_per="batch")


def test_a_compiled_training_is_one_graph_with_the_same_losses(make_trainer):
    torch._dynamo.reset()
    scheme = {"output_bits": None}  # a code that falls to another side would spread
    plain = make_trainer(scheme=scheme)
    plain.train()
    torch.manual_seed(0)
    compiled = make_trainer(scheme=scheme, torch_compile=True, torch_compile_backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    torch._dynamo.reset()


def test_a_teacher_may_be_of_another_type(make_trainer):
    plain = make_trainer()
    plain.train()
    cast = make_trainer(own={"teacher_dtype": "bfloat16"})
    cast.train()
    assert {p.dtype for p in cast.teacher.parameters()} == {torch.bfloat16}
    original = dict(plain.teacher.named_buffers())  # rotary frequencies: rounded, positions drift
    assert original and all(torch.equal(b, original[n]) for n, b in cast.teacher.named_buffers())
    assert {p.dtype for p in cast.model.parameters()} == {torch.float32}
    assert losses(cast) != losses(plain)
    assert losses(cast) == pytest.approx(losses(plain), rel=0.1)
    for wrong in ("int8", "bf16", 16, "load"):
        with pytest.raises(AnalogError, match=r"write teacher_dtype='bfloat16'"):
            make_trainer(own={"teacher_dtype": wrong})
