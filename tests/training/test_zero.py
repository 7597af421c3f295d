"""The launch file of DeepSpeed's ZeRO-2, and what is refused of DeepSpeed.

Trainings under it: tests/integrations/test_processes.py, where DeepSpeed is installed.
"""

import json
from pathlib import Path

import pytest
import yaml

from analog_plugin import AnalogError
from analog_plugin.training.zero import check_zero

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "distributed" / "zero2.json"


def changed(**values):
    return json.loads(FILE.read_text()) | values


def test_the_launch_file_names_a_configuration_that_is_accepted():
    launch = yaml.safe_load(FILE.with_suffix(".yaml").read_text())
    assert ROOT / launch["deepspeed_config"]["deepspeed_config_file"] == FILE
    assert launch["distributed_type"] == "DEEPSPEED"
    check_zero(changed(), saves=False)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"zero_optimization": {"stage": 3}}, "not with stage 3; write stage: 2"),
        ({"zero_optimization": {}}, "not with stage None"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "leave offload_optimizer out",
        ),
        ({"optimizer": {"type": "AdamW"}}, "leave optimizer out"),
        ({"scheduler": {"type": "WarmupLR"}}, "leave scheduler out"),
        ({"fp16": {"enabled": True}}, "train in bf16"),
    ],
    ids=["zero-3", "no stage", "offload", "optimizer", "scheduler", "fp16"],
)
def test_other_ways_of_deepspeed_are_refused_in_a_sentence(values, message):
    with pytest.raises(AnalogError, match=message):
        check_zero(changed(**values), saves=False)


def test_a_gradient_clipping_that_would_do_nothing_is_refused():
    config = changed()
    del config["gradient_clipping"]
    with pytest.raises(AnalogError, match='write "gradient_clipping": "auto"'):
        check_zero(config, saves=False)


def test_checkpoints_that_are_read_by_pickle_are_refused():
    with pytest.raises(AnalogError, match='save_strategy: "no"'):
        check_zero(changed(), saves=True)
