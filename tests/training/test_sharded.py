"""Launch files, and ways of sharding that are refused."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_models import tiny

from analog_plugin import AnalogError
from analog_plugin.layers import analog_layers
from analog_plugin.training.callback import refuse_deepspeed
from analog_plugin.training.sharded import Skeleton, check_plugin, keep_ranges_whole

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"


def environment(name, monkeypatch):
    """What ``accelerate launch`` with this file hands to the processes."""
    arguments = ["--config_file", str(EXAMPLES / name), "--no_python", "optimum-cli"]
    # Without GPUs: they are counted when the file asks for all.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_accelerate_takes_the_launch_files(name, monkeypatch):
    config = load_config_from_file(str(EXAMPLES / name))
    # Beside a DeepSpeed file of its own Accelerate allows no mixed_precision.
    assert config.num_processes == 8 and config.mixed_precision in ("no", None)
    args, _ = environment(name, monkeypatch)
    assert args.no_python and args.num_processes == 8


def test_the_fsdp_file_asks_for_what_is_accepted(monkeypatch):
    _, given = environment("fsdp2.yaml", monkeypatch)
    for key, value in given.items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    check_plugin(plugin, saves=True)
    assert plugin.reshard_after_forward is True


def test_the_slurm_script_is_sound():
    assert subprocess.run(["bash", "-n", EXAMPLES / "slurm.sh"]).returncode == 0


def test_unsuitable_sharding_is_refused():
    with pytest.raises(AnalogError, match="write fsdp_version: 2"):
        check_plugin(FullyShardedDataParallelPlugin(fsdp_version=1), saves=False)
    sharded = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    check_plugin(sharded, saves=False)
    with pytest.raises(AnalogError, match="write fsdp_state_dict_type: FULL_STATE_DICT"):
        check_plugin(sharded, saves=True)


@pytest.mark.parametrize(
    "args",
    [
        SimpleNamespace(deepspeed="zero3.json"),
        SimpleNamespace(
            deepspeed=None, distributed_state=SimpleNamespace(distributed_type="DEEPSPEED")
        ),
    ],
    ids=["by arguments", "by launcher"],
)
def test_deepspeed_is_refused_in_a_sentence(args):
    with pytest.raises(AnalogError, match="train by AnalogTrainer"):
        refuse_deepspeed(args)
    refuse_deepspeed(SimpleNamespace(deepspeed=None))


def test_ranges_are_left_out_of_sharding_beside_what_the_user_leaves_out(make_analog):
    model = make_analog()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, ignored_modules=r".*\.embed_tokens")
    keep_ranges_whole(plugin, model)
    left_out = {id(p) for module in plugin.ignored_modules for p in module.parameters()}
    ranges = {id(layer.input_range) for _, layer in analog_layers(model)}
    assert left_out == ranges | {id(model.model.embed_tokens.weight)}


@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_a_skeleton_is_the_model_without_its_weights(tie):
    model = tiny(tie=tie)
    skeleton = Skeleton(model).model
    assert all(parameter.numel() == 0 for parameter in skeleton.parameters())
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in skeleton.named_parameters()] == names
    assert all(parameter.numel() > 0 for parameter in model.parameters())
    assert torch.equal(skeleton.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
