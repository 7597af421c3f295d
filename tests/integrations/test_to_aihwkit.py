"""``optimum-cli analog to-aihwkit``: an analog checkpoint on aihwkit's tiles."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from analog_integrations.optimum import main_to_aihwkit
from analog_plugin import AnalogError, load_checkpoint
from analog_plugin.data import evaluation_tokens
from analog_plugin.evaluation import Reference
from analog_plugin.evaluation.fidelity import fidelity
from analog_plugin.pretrained import load_causal_lm, load_tokenizer

CLI = Path(sys.executable).with_name("optimum-cli")


@pytest.fixture
def measured(corpus):
    return {"corpus": str(corpus), "blocks": 3, "length": 32, "device": "cpu"}


def test_the_command_programs_and_reads_a_checkpoint_as_time_passes(
    analog_directory, corpus, tmp_path
):
    result = subprocess.run(
        [str(CLI), "analog", "to-aihwkit", str(analog_directory), "out", "--time", "1h,1y",
         "--seeds", "2", "--corpus", str(corpus), "--blocks", "3", "--length", "32",
         "--device", "cpu"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert text in result.stdout
    lines = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| a")]
    assert [tuple(cell.strip() for cell in line) for line in lines] == [
        ("analog-plugin", "none"), ("aihwkit", "none"), ("aihwkit", "hermes"),
        ("aihwkit", "hermes@1h"), ("aihwkit", "hermes@1y"),
    ]  # fmt: skip
    with (tmp_path / "out" / "table.csv").open() as file:
        seeds = {(row["noise"], row["seeds"]) for row in csv.DictReader(file)}
    assert seeds == {("none", "1"), ("hermes", "2"), ("hermes@1h", "2"), ("hermes@1y", "2")}


def test_what_is_reported_is_what_the_models_compute(
    analog_directory, model_directory, measured, corpus, capsys
):
    options = {"noise": "pcm:3", "time": (), "seeds": 1, "drift_compensation": False}
    found = main_to_aihwkit(analog_directory, **options, **measured)
    ours = load_checkpoint(analog_directory)
    tokens = evaluation_tokens(load_tokenizer(analog_directory), 3, 32, str(corpus))
    # The same weights as the original's, of which nothing was trained.
    original = Reference.of(load_causal_lm(model_directory), tokens)
    expected = fidelity(ours, tokens, original)
    (here,), (clean, noisy) = found["analog-plugin"].cells, found["aihwkit"].cells
    assert here.metrics["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    assert clean.metrics["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert abs(clean.metrics["kl_to_here"]) < 1e-3
    assert noisy.metrics["kl"] > 1.2 * clean.metrics["kl"] and noisy.noise == "pcm:3"
    again = main_to_aihwkit(analog_directory, original=str(model_directory), **options, **measured)
    assert again["aihwkit"].cells[1].metrics["kl"] == pytest.approx(noisy.metrics["kl"], rel=1e-5)
    assert str(model_directory) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": "gaussian"}, r"'gaussian'.*noise_model='pcm'"),
        ({"noise": "hermes@1h"}, r"has a time"),
        ({"time": ("soon",)}, r"time is 'soon'.*1h"),
        ({"seeds": 0}, r"seeds is 0"),
        ({"blocks": 0}, r"blocks is 0"),
        ({"length": 65}, r"length is 65, but the model allows at most 64"),
        ({"tiles": "fpga"}, r"tiles is 'fpga'"),
        ({"corpus": "nowhere.txt"}, r"nowhere.txt"),
        ({"original": "nowhere"}, r"nowhere"),
        ({"device": "abacus"}, r"'abacus' cannot be used"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_and_nothing_is_written(
    given, message, analog_directory, measured, tmp_path
):
    with pytest.raises(AnalogError, match=message):
        main_to_aihwkit(analog_directory, tmp_path / "out", **(measured | given))
    assert not (tmp_path / "out").exists()


def test_other_directories_and_full_outputs_are_refused(
    checkpoints, model_directory, measured, tmp_path
):
    with pytest.raises(AnalogError, match=r"plain model without analog state"):
        main_to_aihwkit(model_directory, **measured)
    with pytest.raises(AnalogError, match=r"purely digital"):
        main_to_aihwkit(checkpoints / "w8a8", **measured)
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(AnalogError, match=r"not empty.*--overwrite"):
        main_to_aihwkit(checkpoints / "analog-fp", tmp_path, **measured)
