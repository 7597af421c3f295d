"""What a directory holds, and that a broken one is refused in one sentence."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from analog_plugin import AnalogError, load_checkpoint, save_checkpoint
from analog_plugin.checkpoint.card import result_table
from analog_plugin.checkpoint.layout import AnalogConfig, verify_manifest
from analog_plugin.evaluation.noise import NoiseCell, NoiseReport
from analog_plugin.paths import atomic_directory, check_output
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.training.pipeline import AnalogResult
from optimum.analog import AnalogModelForCausalLM


@pytest.fixture
def directory(make_analog, tmp_path):
    return save_checkpoint(make_analog(), tmp_path / "out")


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_the_directory_holds_what_the_layout_says(directory):
    files = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert {
        "config.json",
        "model.safetensors",
        "analog/analog_state.safetensors",
        "analog/manifest.json",
        "README.md",
    } <= files
    listed = set(json.loads((directory / "analog/manifest.json").read_text())["files"])
    assert listed == files - {"README.md", "analog/manifest.json"}


def test_weights_hold_nothing_that_plain_loaders_do_not_know(directory):
    parts = {name.rsplit(".", 1)[-1] for name in load_file(directory / "model.safetensors")}
    assert parts == {"weight", "input_scale"}


def test_the_card_says_what_it_is(directory):
    card = (directory / "README.md").read_text()
    assert "analog-fp" in card and "8 bit" in card and "[-128, 127]" in card


def test_a_digital_profile_cannot_become_analog_again(make_analog, tmp_path):
    save_checkpoint(make_analog(), tmp_path / "out", profile="w8a8")
    assert not (tmp_path / "out" / "analog/analog_state.safetensors").exists()
    with pytest.raises(AnalogError, match=r"purely digital.*analog-fp"):
        AnalogModelForCausalLM.from_pretrained(tmp_path / "out")


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def config(change):
    return lambda directory: change_json(directory / "config.json", change)


def set_state(file):
    return config(lambda values: values["analog_config"]["state"].update(file=file))


DAMAGE = {
    "truncated weights": (truncate, "bytes, but the manifest says"),
    "one bit flipped": (flip, "SHA-256"),
    "missing state": (lambda d: (d / "analog/analog_state.safetensors").unlink(), "lacks|no"),
    "missing manifest": (lambda d: (d / "analog/manifest.json").unlink(), "not written whole"),
    "garbage manifest": (lambda d: (d / "analog/manifest.json").write_text("{"), "cannot be read"),
    "list manifest": (lambda d: (d / "analog/manifest.json").write_text("[]"), "cannot be read"),
    "escaping manifest": (
        lambda d: change_json(
            d / "analog/manifest.json",
            lambda v: v["files"].update({"../x": {"size": 1, "sha256": "0"}}),
        ),
        "outside",
    ),
    "altered config": (config(lambda v: v.update(hidden_act="relu")), "bytes|SHA-256"),
    "unknown version": (config(lambda v: v["analog_config"].update(version=2)), "version 2"),
    "no version": (config(lambda v: v["analog_config"].pop("version")), "version None"),
    "state elsewhere": (set_state("../../etc/passwd"), "state.file"),
    "absolute state": (set_state("/etc/passwd"), "state.file"),
    "unknown key": (config(lambda v: v["analog_config"].update(code="x")), "code"),
    "bits 17": (config(lambda v: v["analog_config"]["scheme"].update(input_bits=17)), "input_bits"),
    "garbage config": (lambda d: (d / "config.json").write_text("nonsense"), "cannot be read"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_broken_directory_is_one_sentence(damage, message, directory):
    damage(directory)
    with pytest.raises(AnalogError, match=message) as caught:
        load_checkpoint(directory)
    assert "\n" not in str(caught.value)


def test_tiles_that_do_not_fit_are_refused_even_unverified(directory):
    name = "model.layers.0.mlp.down_proj"
    config(lambda v: v["analog_config"]["tiles"].update({name: [96]}))(directory)
    with pytest.raises(AnalogError, match="does not describe the tiles"):
        load_checkpoint(directory, verify=False)


def test_a_missing_directory_is_one_sentence(tmp_path):
    for source in (tmp_path / "none", "nobody/nothing", "nothing"):
        with pytest.raises(AnalogError):
            load_checkpoint(source)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3),
)  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(["version", "profile", "scheme", "tiles", "state", "x"]),
        json_values | st.just(1),
    )
)
def test_any_analog_config_is_read_or_refused(tmp_path_factory, values):
    try:
        AnalogConfig.read(values, tmp_path_factory.getbasetemp())
    except AnalogError as error:
        assert str(error)


def test_an_unknown_profile_is_refused_before_anything_is_written(make_analog, tmp_path):
    with pytest.raises(AnalogError, match="no deploy profile 'w9a9'"):
        save_checkpoint(make_analog(), tmp_path / "out", profile="w9a9")
    assert list(tmp_path.iterdir()) == []


def test_a_full_directory_is_refused_and_overwrite_replaces_it(make_analog, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    model = make_analog()
    with pytest.raises(AnalogError, match=r"exists and is not empty.*--overwrite"):
        save_checkpoint(model, tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").exists()
    save_checkpoint(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(AnalogError, match="is a file"):
        check_output(tmp_path / "out", overwrite=True)


def test_a_failure_leaves_the_old_directory_and_no_litter(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out", True) as new:
        (new / "half").write_text("x")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_a_crash_between_the_renames_is_mended(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").write_text("x")
    check_output(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "old").exists() and not (tmp_path / ".out.replaced").exists()


def test_a_killed_writer_leaves_a_whole_directory(make_analog, tmp_path):
    """kill -9 at changing moments while a process replaces the directory again and again."""
    save_checkpoint(make_analog(), tmp_path / "source")
    code = (
        "import sys\n"
        "from analog_plugin import load_checkpoint, save_checkpoint\n"
        "model = load_checkpoint(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    save_checkpoint(model, sys.argv[2], overwrite=True)\n"
    )
    target = tmp_path / "out"
    for round_number in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "source"), str(target)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ,
        )  # fmt: skip
        assert process.stdout.readline()
        time.sleep(0.5 + 0.13 * round_number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        check_output(target, overwrite=True)
        if target.exists():
            verify_manifest(target)
            assert isinstance(load_checkpoint(target), torch.nn.Module)


def test_a_card_says_what_is_not_finite():
    """Training is done when the card is written: a broken measurement must not lose it."""
    cells = [NoiseCell("pcm", seed, {"kl": value}) for seed, value in enumerate((1.0, math.nan))]
    reports = {name: NoiseReport(cells) for name in ("original", "analog-trained")}
    result = AnalogResult(None, AnalogRecipe(), reports)
    assert result_table(result).count("not finite") == 3
