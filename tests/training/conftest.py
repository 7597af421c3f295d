import copy

import pytest
import torch
from tiny_models import tiny, token_ids
from transformers import TrainingArguments

from analog_plugin import AnalogScheme, AnalogTrainer, calibrate_ranges, convert_to_analog


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer over a tiny analog model, and what it needs."""

    def make(name="llama", *, scheme=None, examples=None, model=None, cls=AnalogTrainer,
             own=None, **arguments):  # fmt: skip
        model = tiny(name, num_hidden_layers=1) if model is None and name != "gpt2" else (
            model or tiny(name)
        )  # fmt: skip
        teacher = copy.deepcopy(model)
        settings = {"tile_rows": 48, "clip_sigma": None} | (scheme or {})
        convert_to_analog(model, AnalogScheme(**settings))
        calibrate_ranges(model, [{"input_ids": token_ids(8, 16)}])
        if examples is None:
            examples = [{"input_ids": row} for row in token_ids(8, 16)]
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_steps": 3, "learning_rate": 1e-3,
            "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no",
            "use_cpu": True, "logging_steps": 1, "remove_unused_columns": False,
            "disable_tqdm": True, "seed": 0, "lr_scheduler_type": "constant",
        }  # fmt: skip
        return cls(
            model, teacher=teacher, args=TrainingArguments(**(defaults | arguments)),
            train_dataset=examples, **(own or {}),
        )  # fmt: skip

    return make


@pytest.fixture
def weights():
    def collect(model):
        return {k: v.detach().clone() for k, v in model.named_parameters()}

    return collect


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
