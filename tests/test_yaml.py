"""What all readers of YAML that others wrote refuse before it costs much."""

import sys

import pytest

from analog_integrations.llmcompressor import read_recipe
from analog_plugin import AnalogRecipe, AnalogScheme
from analog_plugin.errors import AnalogError

READERS = {
    "recipe": read_recipe,
    "assignment": lambda path: AnalogRecipe.parse({"assignment": str(path)}),
    "scheme": AnalogScheme.from_yaml,
    "scheme's text": lambda path: AnalogScheme.from_yaml(path.read_text(encoding="utf-8")),
}
FILES = {
    "sequences": ("[" * 50_000, "is nested more than 100 deep"),
    "sequences, a line each": ("[\n" * 50_000, "is nested more than 100 deep"),
    "mappings": ("{a: " * 50_000, "is nested more than 100 deep"),
    "blocks": ("- " * 50_000, "is nested more than 100 deep"),
    # Each would hold ten times as many fields as the one before.
    "merges": (
        "l0: &l0 {a: 1, b: 2}\n"
        + "".join(f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * 10)}]}}\n" for i in range(1, 9)),
        "merges mappings by <<; write their fields out",
    ),
    "no date": ("a: 2024-13-45\n", "is not valid YAML: month must be in 1..12"),
    "Python's objects": ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML: could not"),
}


@pytest.fixture
def deep_recursion():
    """Python may recurse deeper than usual: that it may not is not what ends the reading."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(5000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_what_would_cost_too_much_is_refused(tmp_path, deep_recursion, read, text, message):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(AnalogError, match=message) as caught:
        read(path)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["recipe", "assignment", "scheme"])
def test_a_file_longer_than_settings_are_is_refused_unread(tmp_path, name):
    path = tmp_path / "file.yaml"
    path.write_text("a: 1\n" * 1_000_000)
    with pytest.raises(AnalogError, match="5000000 bytes, more than any such file"):
        READERS[name](path)


@pytest.mark.parametrize("name", ["recipe", "assignment", "scheme"])
def test_a_directory_is_no_file(tmp_path, name):
    with pytest.raises(AnalogError, match="is no file; give a file"):
        READERS[name](tmp_path)


def test_aliases_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "a_stage:\n  a_modifiers:\n    AnalogModifier:\n      scheme:\n        overrides:\n"
        "          '*.0.*': &six {input_bits: 6}\n          '*.1.*': *six\n"
    )
    overrides = read_recipe(path).scheme["overrides"]
    assert overrides["*.0.*"] == overrides["*.1.*"]
