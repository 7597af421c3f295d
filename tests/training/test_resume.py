"""Training checkpoints: a run that was broken off and resumed ends like the unbroken one."""

import pytest
import torch
from tiny_models import tiny, token_ids
from transformers import Trainer, TrainerCallback, TrainingArguments

from analog_plugin import AnalogCallback, AnalogScheme, calibrate_ranges, convert_to_analog
from analog_plugin.layers import analog_layers
from analog_plugin.scheme import FUSED_GROUPS
from analog_plugin.training import TrainingDiverged

SCHEMES = {
    "tied ranges": {"tie_ranges": FUSED_GROUPS},
    "constant clip": {"clip_sigma": 2.0},
    "annealed clip": {"clip_sigma": 2.0, "clip_schedule": "anneal"},
    "ranges found in training": {"range_init_in_training": True, "range_init_batches": 4},
    "tied ranges found in training": {
        "range_init_in_training": True, "range_init_batches": 4, "tie_ranges": FUSED_GROUPS,
    },
}  # fmt: skip
OPTIONS = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
}  # fmt: skip


def different(first, second):
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_resumed_run_ends_with_the_same_bits(name, make_trainer):
    unbroken = make_trainer(scheme=SCHEMES[name], **OPTIONS)
    unbroken.train()
    resumed = make_trainer(scheme=SCHEMES[name], **OPTIONS)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert different(unbroken.model, resumed.model) == []


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "tied embeddings"])
def test_runs_of_other_architectures_resume_too(name, make_trainer):
    def make():
        if name == "tied embeddings":
            return make_trainer(model=tiny(tie=True), scheme=SCHEMES["tied ranges"], **OPTIONS)
        return make_trainer(name, scheme=SCHEMES["tied ranges"], **OPTIONS)

    unbroken, resumed = make(), make()
    unbroken.train()
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert different(unbroken.model, resumed.model) == []


def test_an_annealed_clip_goes_on_from_where_it_began(make_trainer):
    options = OPTIONS | {"restore_callback_states_from_checkpoint": True}
    unbroken = make_trainer(scheme=SCHEMES["annealed clip"], **options)
    unbroken.train()
    resumed = make_trainer(scheme=SCHEMES["annealed clip"], **options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert different(unbroken.model, resumed.model) == []


def test_tied_ranges_are_still_one_parameter_after_resuming(make_trainer):
    make_trainer(scheme=SCHEMES["tied ranges"], **OPTIONS).train()
    resumed = make_trainer(scheme=SCHEMES["tied ranges"], **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    layers = dict(analog_layers(resumed.model))
    mlp = "model.layers.0.mlp"
    assert layers[f"{mlp}.gate_proj"].input_range is layers[f"{mlp}.up_proj"].input_range


class Poison(TrainerCallback):
    """One gradient of the given step is not finite."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            handle = model.lm_head.weight.register_hook(
                lambda grad: (handle.remove(), grad * float("nan"))[1]
            )


@pytest.mark.parametrize("restore", [False, True], ids=["callbacks anew", "callbacks restored"])
def test_skipped_steps_are_counted_after_resuming(restore, make_trainer):
    options = OPTIONS | {"restore_callback_states_from_checkpoint": restore}
    make_trainer(**options).train()
    resumed = make_trainer(own={"callbacks": [Poison(4)]}, **options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert resumed.analog_callback.skipped_steps == 1
    assert resumed.analog_callback in resumed.callback_handler.callbacks


def test_skipped_steps_before_the_checkpoint_are_remembered(make_trainer):
    options = OPTIONS | {"restore_callback_states_from_checkpoint": True}
    make_trainer(own={"callbacks": [Poison(1)]}, **options).train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert resumed.analog_callback.skipped_steps == 1


def test_skipped_steps_in_a_row_are_counted_across_a_checkpoint(make_trainer):
    make_trainer(own={"callbacks": [Poison(2)]}, **OPTIONS).train()
    resumed = make_trainer(own={"callbacks": [AnalogCallback(max_skipped=2), Poison(3)]}, **OPTIONS)
    with pytest.raises(TrainingDiverged, match=r"stopped at step 3: .* in 2 steps in a row"):
        resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")


def test_another_training_begins_its_counts_anew(make_trainer):
    trainer = make_trainer(
        own={"callbacks": [Poison(1)]}, scheme=SCHEMES["annealed clip"], max_steps=2
    )
    trainer.train()
    first = dict(trainer.analog_callback.clip_start)
    assert trainer.analog_callback.skipped_steps == 1
    trainer.pop_callback(Poison)
    trainer.train()
    assert trainer.analog_callback.skipped_steps == 0
    assert trainer.analog_callback.clip_start.keys() == first.keys()
    assert trainer.analog_callback.clip_start != first


@pytest.mark.parametrize("ties", [(), FUSED_GROUPS], ids=["own ranges", "tied ranges"])
def test_an_ordinary_trainer_saves_and_resumes(ties, tmp_path):
    def make():
        model = tiny(num_hidden_layers=1)
        convert_to_analog(model, AnalogScheme(tie_ranges=ties))
        calibrate_ranges(model, [{"input_ids": token_ids(8, 16)}])
        arguments = TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True,
            **(OPTIONS | {"learning_rate": 1e-3}),
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 16)]
        return Trainer(model, args=arguments, train_dataset=rows, callbacks=[AnalogCallback()])

    unbroken, resumed = make(), make()
    unbroken.train()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert different(unbroken.model, resumed.model) == []
