"""``optimum-cli analog plan``."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny

from analog_plugin import AnalogError
from optimum.analog import main_plan

COMMAND = Path(sys.executable).with_name("optimum-cli")


def run(*arguments):
    return subprocess.run(
        [COMMAND, "analog", "plan", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command_prints_a_row_for_each_number_of_gpus():
    done = run("1b", "--gpus", "8,64", "--gpus", "96", "--gpu", "v100", "--price", "2")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [line.split("|")[1].strip() for line in rows] == ["8", "64", "96"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["3b"], "model is '3b'"),
        (["1b", "--gpus", "eight"], "gpus is eight"),
        (["1b", "--tokens", "lots"], "tokens is 'lots'"),
        (["1b", "--price", "-1"], "price is -1.0"),
    ],
)
def test_a_wrong_value_ends_with_one_sentence(arguments, said):
    done = run(*arguments)
    assert done.returncode == 1 and said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_tells_its_own_sizes(tmp_path, capsys):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    (found,) = main_plan(tmp_path, gpus=[1], as_json=True)
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["memory"] == found.memory
    assert found.memory["weights"] == 4 * model.num_parameters()


def test_a_broken_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AnalogError, match="cannot be read as JSON"):
        main_plan(tmp_path)


def test_a_cost_is_told_only_with_a_price(capsys):
    main_plan("8b", gpus=[8])
    assert "cost" not in capsys.readouterr().out
    (found,) = main_plan("8b", gpus=[8], price=2.0)
    assert "cost" in capsys.readouterr().out
    assert found.cost(2.0) == 2 * 8 * (found.training_hours + found.sampling_hours)


def test_the_tables_of_the_docs_are_what_the_command_prints(capsys):
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    found = re.findall(r"<!-- begin plan (\S+)(.*?) -->\n(.*?)\n<!-- end plan", page, re.DOTALL)
    assert len(found) == 4
    for model, option, text in found:
        main_plan(model, **({"teacher": False} if "--stored-teacher" in option else {}))
        printed = [line for line in capsys.readouterr().out.splitlines() if line[0] != "*"]
        assert [line for line in text.splitlines() if line] == printed


def test_an_estimate_loads_no_torch():
    code = "import sys; from analog_integrations.optimum import main_plan; main_plan('1b'); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")
