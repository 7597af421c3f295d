"""One optimizer step after another: ranges, clipping, and steps that are not finite."""

import pytest
import torch
from tiny_models import tiny, token_ids
from transformers import Trainer, TrainerCallback, TrainingArguments

from analog_plugin import AnalogCallback, AnalogScheme, calibrate_ranges, convert_to_analog
from analog_plugin.layers import analog_layers
from analog_plugin.ops.clip import peak_to_sigma
from analog_plugin.scheme import FUSED_GROUPS
from analog_plugin.training import TrainingDiverged


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Watch(TrainerCallback):
    """Weights before each step, after the optimizer, and after all callbacks."""

    def __init__(self):
        self.before, self.optimized, self.after = [], [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(parameters(model))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.optimized.append(parameters(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(parameters(model))


@pytest.fixture
def plain(tmp_path):
    """An ordinary Trainer with its ordinary loss, over an analog model."""

    def make(callback, scheme=None, callbacks=(), **arguments):
        model = tiny(num_hidden_layers=1)
        convert_to_analog(model, AnalogScheme(**({"clip_sigma": None} | (scheme or {}))))
        calibrate_ranges(model, [{"input_ids": token_ids(8, 16)}])
        defaults = {
            "output_dir": str(tmp_path / "plain"), "max_steps": 3, "learning_rate": 1e-3,
            "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
            "logging_steps": 1, "lr_scheduler_type": "constant",
        }  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 16)]
        return Trainer(
            model, args=TrainingArguments(**(defaults | arguments)), train_dataset=rows,
            callbacks=[*callbacks, callback],
        )  # fmt: skip

    return make


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_after_each_step_weights_are_clipped_to_the_deviation_of_their_column(name, make_trainer):
    watch = Watch()
    trainer = make_trainer(name, scheme={"clip_sigma": 2.0}, own={"callbacks": [watch]})
    trainer.train()
    for optimized, after in zip(watch.optimized, watch.after, strict=True):
        for layer_name, layer in analog_layers(trainer.model):
            key = f"{layer_name}.weight"
            weight = optimized[key].double()
            weight, kept = (w.T if name == "gpt2" else w for w in (weight, after[key].double()))
            bound = 2.0 * weight.std(dim=1, keepdim=True)
            torch.testing.assert_close(kept, weight.clamp(-bound, bound), rtol=1e-6, atol=0)
            assert not torch.equal(kept, weight)
            assert layer.weight.shape == optimized[key].shape


def test_without_a_clip_the_callback_leaves_weights_as_the_optimizer_made_them(make_trainer):
    watch = Watch()
    make_trainer(scheme={"clip_sigma": None}, own={"callbacks": [watch]}).train()
    for optimized, after in zip(watch.optimized, watch.after, strict=True):
        assert all(name.endswith("input_range") for name in changed(optimized, after))


def test_layers_that_are_not_analog_are_not_clipped(make_trainer):
    watch = Watch()
    make_trainer(scheme={"clip_sigma": 1.0}, own={"callbacks": [watch]}).train()
    others = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    for optimized, after in zip(watch.optimized, watch.after, strict=True):
        assert not others & set(changed(optimized, after))


def test_an_annealed_clip_begins_at_the_largest_weight_and_ends_at_its_target(make_trainer):
    watch = Watch()
    scheme = {"clip_sigma": 1.5, "clip_schedule": "anneal", "clip_anneal_share": 0.5}
    trainer = make_trainer(
        scheme=scheme, own={"callbacks": [watch]}, max_steps=8, learning_rate=1e-6
    )
    start = {name: peak_to_sigma(layer.tile_weight) for name, layer in analog_layers(trainer.model)}
    trainer.train()
    for name, _ in analog_layers(trainer.model):
        key = f"{name}.weight"
        assert start[name] > 1.5
        for step, (optimized, after) in enumerate(zip(watch.optimized, watch.after, strict=True)):
            share = min((step + 1) / 8 / 0.5, 1.0)
            alpha = start[name] ** (1 - share) * 1.5**share
            weight = optimized[key].double()
            bound = alpha * weight.std(dim=1, keepdim=True)
            expected = weight.clamp(-bound, bound)
            torch.testing.assert_close(after[key].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_huge_range_gradients_neither_show_nor_act_in_the_norm(max_grad_norm, make_trainer):
    class Huge(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for parameter in {layer.input_range for _, layer in analog_layers(model)}:
                parameter.register_hook(lambda grad: grad + 1e6)

    runs = []
    for callbacks in ([], [Huge()]):
        trainer = make_trainer(
            max_steps=1, max_grad_norm=max_grad_norm, own={"callbacks": callbacks}, optim="sgd",
            scheme={"tie_ranges": FUSED_GROUPS},
        )  # fmt: skip
        trainer.train()
        norm = next(e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e)
        weights = {n: p for n, p in parameters(trainer.model).items() if "input_range" not in n}
        runs.append((norm, weights))
    assert changed(runs[0][1], runs[1][1]) == []
    assert runs[0][0] == runs[1][0]


def test_weight_decay_does_not_shrink_ranges(make_trainer):
    """No range clips and none decays, so nothing but weight decay could move them."""
    trainer = make_trainer(
        scheme={"range_decay": 0.0}, weight_decay=0.5, learning_rate=0.1, max_steps=2, optim="sgd",
        own={"range_learning_rate": 0.1},
    )  # fmt: skip
    for _, layer in analog_layers(trainer.model):
        layer.set_input_range(1e4)
    trainer.train()
    for _, layer in analog_layers(trainer.model):
        torch.testing.assert_close(
            layer.input_range.detach(), torch.full_like(layer.input_range, 1e4)
        )


@pytest.mark.parametrize("input_range", ["static", "dynamic"])
def test_ranges_that_are_not_learned_stay(input_range, make_trainer):
    trainer = make_trainer(scheme={"input_range": input_range})
    before = {name: layer.input_range.clone() for name, layer in analog_layers(trainer.model)}
    trainer.train()
    for name, layer in analog_layers(trainer.model):
        assert torch.equal(layer.input_range, before[name]) and not layer.input_range.requires_grad


def test_tied_ranges_move_together_and_once(make_trainer):
    """With SGD the update is the decay alone, since nothing clips: once for three layers."""
    trainer = make_trainer(
        scheme={"tie_ranges": FUSED_GROUPS, "range_init": "max"}, max_steps=1, optim="sgd",
        own={"range_learning_rate": 0.5},
    )  # fmt: skip
    layers = dict(analog_layers(trainer.model))
    for layer in layers.values():
        if layer.owns_range:
            layer.set_input_range(layer.input_range.detach() * 2)
    before = {name: layer.input_range.detach().clone() for name, layer in layers.items()}
    trainer.train()
    attention = "model.layers.0.self_attn"
    assert layers[f"{attention}.q_proj"].input_range is layers[f"{attention}.v_proj"].input_range
    for name, layer in layers.items():
        old = before[name]
        torch.testing.assert_close(layer.input_range.detach(), old * (1 - 0.5 * 0.01 * old))


def test_the_ranges_learning_rate_follows_the_schedule(make_trainer):
    trainer = make_trainer(lr_scheduler_type="linear", max_steps=4, learning_rate=1e-3,
                           own={"range_learning_rate": 0.02})  # fmt: skip
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]))

    trainer.add_callback(Rates())
    trainer.train()
    assert rates == [pytest.approx((1e-3 * s, 0.02 * s)) for s in (1.0, 0.75, 0.5, 0.25)]


class BadTeacher(TrainerCallback):
    """The teacher's answers in the given steps are not finite."""

    def __init__(self, steps, value):
        self.steps, self.value, self.teacher, self.active = steps, value, None, False

    def watch(self, teacher):
        teacher.lm_head.register_forward_hook(
            lambda module, args, output: output + self.value if self.active else output
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self.active = state.global_step in self.steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_teacher_that_is_not_finite_costs_its_step_only(accumulation, make_trainer):
    watch, bad = Watch(), BadTeacher({1}, float("nan"))
    trainer = make_trainer(
        own={"callbacks": [watch, bad]}, scheme={"clip_sigma": 2.0}, max_steps=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    bad.watch(trainer.teacher)
    trainer.train()
    assert trainer.analog_callback.skipped_steps == 1
    moved = [bool(changed(b, a)) for b, a in zip(watch.before, watch.after, strict=True)]
    assert moved == [True, False, True]


def poison(what, steps):
    """Gradients of one parameter that are not finite in the given steps."""

    class Poison(TrainerCallback):
        active = False

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            parameter = next(p for n, p in model.named_parameters() if n.endswith(what))
            parameter.register_hook(lambda g: g * float("inf") if self.active else g)

        def on_step_begin(self, args, state, control, **kwargs):
            self.active = state.global_step in steps

    return Poison()


@pytest.mark.parametrize("what", ["q_proj.weight", "embed_tokens.weight", "norm.weight"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_one_bad_gradient_leaves_all_parameters_as_they_were(what, max_grad_norm, make_trainer):
    watch = Watch()
    trainer = make_trainer(
        own={"callbacks": [watch, poison(what, {1})]}, weight_decay=0.1,
        scheme={"clip_sigma": 2.0}, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    trainer.train()
    assert trainer.analog_callback.skipped_steps == 1
    moved = [bool(changed(b, a)) for b, a in zip(watch.before, watch.after, strict=True)]
    assert moved == [True, False, True]


def test_a_bad_range_gradient_is_skipped_too(make_trainer):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                _, layer = next(analog_layers(model))
                handle = layer.input_range.register_hook(
                    lambda grad: (handle.remove(), torch.full_like(grad, float("nan")))[1]
                )

    watch = Watch()
    trainer = make_trainer(own={"callbacks": [watch, Poison()]})
    trainer.train()
    moved = [bool(changed(b, a)) for b, a in zip(watch.before, watch.after, strict=True)]
    assert moved == [True, False, True] and trainer.analog_callback.skipped_steps == 1


def test_only_skipped_steps_in_a_row_end_the_run(plain):
    callback = AnalogCallback(max_skipped=2)
    trainer = plain(callback, callbacks=[poison("q_proj.weight", {0, 2, 4})], max_steps=6)
    trainer.train()
    assert callback.skipped_steps == 3
    callback = AnalogCallback(max_skipped=2)
    trainer = plain(callback, callbacks=[poison("q_proj.weight", {0, 2, 3, 4})], max_steps=6)
    message = r"stopped at step 3: the loss or a gradient was not finite in 2 steps in a row; write"
    with pytest.raises(TrainingDiverged, match=message):
        trainer.train()
    assert callback.skipped_steps == 3


def test_a_skipped_step_is_reported(plain, caplog):
    plain(AnalogCallback(), callbacks=[poison("q_proj.weight", {1})]).train()
    assert "Step 1 was skipped: its loss or a gradient is not finite (1 skipped" in caplog.text


def test_an_ordinary_trainer_learns(plain):
    trainer = plain(AnalogCallback(), max_steps=20, learning_rate=3e-3)
    trainer.train()
    assert sum(losses(trainer)[-4:]) < 0.8 * sum(losses(trainer)[:4])


def test_the_callbacks_seed_is_that_of_the_noise(plain):
    def train(noise_seed, seed=0):
        trainer = plain(AnalogCallback(noise_seed), seed=seed)
        trainer.train()
        return losses(trainer)[0], parameters(trainer.model)

    loss, weights = train(3)
    assert changed(weights, train(3)[1]) == []
    assert train(4)[0] != loss


def test_without_its_own_seed_the_callback_takes_the_trainers(plain):
    trainer = plain(AnalogCallback(), seed=8)
    trainer.train()
    explicit = plain(AnalogCallback(8), seed=8)
    explicit.train()
    assert changed(parameters(trainer.model), parameters(explicit.model)) == []


def test_noise_does_not_depend_on_the_global_generator(make_trainer):
    class Disturb(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.rand(7)

    runs = []
    for callbacks in ([], [Disturb()]):
        trainer = make_trainer(own={"callbacks": callbacks}, max_steps=2)  # one pass: no reshuffle
        trainer.train()
        runs.append(parameters(trainer.model))
    assert changed(*runs) == []


def test_micro_batches_and_steps_have_noise_of_their_own(make_trainer):
    """A constant batch and frozen weights: losses differ by the noise alone."""
    row = token_ids(1, 16)[0]
    trainer = make_trainer(
        examples=[{"input_ids": row}] * 8, per_device_train_batch_size=2, max_steps=2,
        gradient_accumulation_steps=2, learning_rate=0.0, own={"range_learning_rate": 1e-12},
    )  # fmt: skip
    seen, compute = [], trainer.compute_loss

    def record(*args, **kwargs):
        loss = compute(*args, **kwargs)
        seen.append(float(loss.detach()))
        return loss

    trainer.compute_loss = record
    trainer.train()
    assert len(seen) == len(set(seen)) == 4


@pytest.mark.parametrize("labels", [True, False])
def test_evaluation_during_training_measures_without_noise(labels, make_trainer):
    rows = [{"input_ids": row} for row in token_ids(4, 16)]
    if labels:
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    trainer = make_trainer(examples=rows, scheme={"weight_noise": 0.2})
    trainer.eval_dataset = rows
    first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == second
