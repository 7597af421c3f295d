"""Recipes, schemes, assignments and noise models that others wrote."""

import pytest
import yaml
from fuzzing import altered, anything, fuzzed, garbled, nasty, survived
from hypothesis import strategies as st

from analog_integrations.llmcompressor import read_recipe
from analog_plugin import AnalogRecipe, AnalogScheme
from analog_plugin.noise import resolve_noise
from analog_plugin.presets import resolve_scheme

FIELDS = AnalogRecipe.parse(
    {
        "scheme": {"preset": "AFM_PLUS", "digital_share": 0.0, "overrides": {"*.0.*": "digital"}},
        "training": {"max_steps": 3, "learning_rate": "5e-5", "trainable": "analog"},
        "deploy": {"profile": ["w8a8", "mixed"], "average_bits": 4.0},
    }
).model_dump(mode="json")
SCHEME = AnalogScheme(tile_rows=512, prefix=1, overrides={"a": "digital"}).to_dict()
RECIPE = {"analog_stage": {"analog_modifiers": {"AnalogModifier": FIELDS}}}
SHORT = """analog_stage:
  analog_modifiers:
    AnalogModifier:
      scheme: {preset: AFM, tile_rows: 512}
      data: {source: self, tokens: 4096}
      training: {max_steps: 80, learning_rate: 5.0e-5}
"""


@pytest.fixture(scope="module", autouse=True)
def read_before(tmp_path_factory):
    """What the host looks up and starts while it is imported is not the file's doing."""
    path = tmp_path_factory.mktemp("before") / "recipe.yaml"
    path.write_text(SHORT)
    read_recipe(path)
    resolve_noise("hermes")


def assignments(values):
    """The files that a recipe names: these it may read."""
    if isinstance(values, dict):
        for name, value in values.items():
            if name == "assignment" and isinstance(value, str):
                yield value
            yield from assignments(value)
    elif isinstance(values, list):
        for value in values:
            yield from assignments(value)


@fuzzed(altered(FIELDS) | anything)
def test_recipes_as_mappings(values):
    with survived(reads=assignments(values)):
        AnalogRecipe.parse(values)


@fuzzed(garbled(SHORT.encode()))
def test_recipes_as_garbled_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(content)
    with survived(path.parent):
        read_recipe(path)


@fuzzed(altered(RECIPE))
def test_recipes_as_files(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(yaml.safe_dump(values).encode("utf-8"))
    with survived(path.parent, reads=assignments(values)):
        read_recipe(path)


@fuzzed(altered(SCHEME) | anything)
def test_schemes_as_mappings(values):
    with survived():
        resolve_scheme(values)
    with survived():
        AnalogScheme.from_dict(values)


@fuzzed(
    garbled(AnalogScheme(**SCHEME).to_json().encode())
    | garbled(AnalogScheme(**SCHEME).to_yaml().encode())
)
def test_schemes_as_text(content):
    text = content.decode("utf-8", errors="replace")
    for read in (AnalogScheme.from_json, AnalogScheme.from_yaml):
        with survived():
            read(text)


@fuzzed(garbled(b"down_proj: digital\n'*.mlp.*': {input_bits: 6}\n"))
def test_assignments(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "assignment.yaml"
    path.write_bytes(content)
    with survived(path.parent):
        AnalogRecipe.parse({"assignment": str(path)})


parts = st.sampled_from(["pcm", "gaussian", "stuck", "ir_drop", "rtn", "hermes", ":", "+", "@", ",",
                         "1d", "0.01", "-1", "nan", "1e400", "{", "chain"])  # fmt: skip


@fuzzed(
    st.lists(parts | nasty, max_size=6).map("".join)
    | altered({"name": "gaussian", "sigma": 0.03})
    | anything
)
def test_noise_models(value):
    with survived():
        resolve_noise(value)
