"""What the documents show is true: code, recipes, commands, names, links, the picture, docstrings.

Every ``python`` block of README.md and docs/ runs as a reader would run it, in a directory that
holds tiny things under the names that the documents use. A block that can only be shown is fenced
``py``.
"""

import argparse
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny, token_ids, word_tokenizer

from analog_integrations.llmcompressor import read_recipe
from analog_integrations.optimum.cli import AnalogExportCommand
from analog_integrations.optimum.cli_generate import AnalogGenerateCommand
from analog_plugin import recipe as recipes
from analog_plugin.plugins import builtin
from optimum.analog import main_export, main_generate

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language):
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for found in FENCE.finditer(text):
            if found[1] == language:
                line = text.count("\n", 0, found.start()) + 1
                yield pytest.param(found[2], id=f"{path.name}:{line}")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """All that the documents name, tiny: a hub model, a text, a recipe, checkpoints."""
    shelf = tmp_path_factory.mktemp("shelf")
    model = shelf / HUB_MODEL
    tiny("llama", max_position_embeddings=256).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    lines = (" ".join(f"w{(i * j + i) % 124}" for i in range(1, 30)) for j in range(40))
    corpus = shelf / "corpus.txt"
    corpus.write_text("\n".join(lines))
    fields = {
        "scheme": {"tile_rows": 32},
        "data": {"tokens": 128, "sequence_length": 16},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4},
        "evaluation": {
            "noise": ["pcm", "pcm:1.5"], "seeds": 2, "blocks": 2, "length": 16,
            "corpus": str(corpus),
        },
    }  # fmt: skip
    stage = {"analog_stage": {"analog_modifiers": {"AnalogModifier": fields}}}
    (shelf / "recipe.yaml").write_text(yaml.safe_dump(stage))
    checkpoint = shelf / "demo-out"
    main_export(str(model), checkpoint, shelf / "recipe.yaml", dataset=token_ids(8, 16))
    (shelf / "smollm2-analog").symlink_to(checkpoint)
    main_generate(
        str(model), shelf / "tokens", tokens="10k", sequence_length=128, shards=4, merge=True,
        validation=0.25,
    )  # fmt: skip
    return shelf


@pytest.fixture
def reader(shelf, tmp_path, monkeypatch):
    """A reader's directory: what it makes itself stays its own."""
    import datasets

    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"))
def test_code_in_the_documents_runs(code, reader, request):
    exec(compile(code, request.node.callspec.id, "exec"), {"__name__": "document"})


RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    "text", [*blocks("yaml"), *(pytest.param(p.read_text(), id=p.name) for p in RECIPES)]
)
def test_recipes_are_read(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    read_recipe(tmp_path / "recipe.yaml")


def test_the_recipe_in_a_checkpoint_runs_again(shelf):
    kept = read_recipe(shelf / "demo-out" / "analog" / "recipe.yaml")
    assert kept == read_recipe(shelf / "recipe.yaml")


def parser():
    made = argparse.ArgumentParser(exit_on_error=False)
    AnalogExportCommand.parse_args(made)
    return made


def test_commands_have_the_arguments_that_documents_and_help_give_them():
    texts = [found[2] for path in DOCUMENTS for found in FENCE.finditer(path.read_text("utf-8"))]
    joined = "\n".join([*texts, parser().epilog]).replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    commands = [line for line in lines if line.startswith("optimum-cli export analog ")]
    assert len(commands) >= 3
    for command in commands:
        given = parser().parse_args(shlex.split(command, comments=True)[3:])
        assert (ROOT / given.recipe).is_file(), command
    generate = argparse.ArgumentParser(exit_on_error=False)
    AnalogGenerateCommand.parse_args(generate)
    joined += generate.epilog.replace("\\\n", " ")
    start = "optimum-cli analog generate "
    commands = [line.strip() for line in joined.splitlines() if line.strip().startswith(start)]
    assert len(commands) >= 5
    for command in commands:
        generate.parse_args(shlex.split(command, comments=True)[3:])


def test_every_setting_and_name_is_described():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    settings = [value for value in vars(recipes).values() if hasattr(value, "model_fields")]
    names = {name for setting in settings for name in setting.model_fields}
    assert "sequence_length" in names
    names |= {record.name for record in [*builtin.analog_presets(), *builtin.analog_exporters()]}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)] == []
    text = (ROOT / "docs" / "noise-models.md").read_text(encoding="utf-8")
    noises = [record.name for record in builtin.analog_noise_models()]
    assert [name for name in noises if f"`{name}`" not in text] == []


def test_every_row_of_the_table_is_explained(shelf):
    explained = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    card = (shelf / "demo-out" / "README.md").read_text(encoding="utf-8")
    table = [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("|")][2:]
    assert len(set(table)) == 5
    for row in set(table):
        assert f"| {row} |" in explained


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for picture, target, anchor in re.findall(r"(!?)\[[^\]]*\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if "://" in target or (picture and "DEMO_TABLE" in text):  # figures are still to come
            continue
        led = path.parent / target if target else path
        assert led.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", led.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in [slug(heading) for heading in headings], anchor
    for named in re.findall(r"`((?:docs|examples|benchmarks)/[^`\s]*)", text):
        assert (ROOT / named).exists(), named


def test_the_picture_of_an_export_is_drawn(reader):
    subprocess.run(
        [sys.executable, ROOT / "examples" / "plot_results.py", "demo-out", "demo.png"],
        check=True, env=os.environ | {"MPLCONFIGDIR": str(reader)},
    )  # fmt: skip
    picture = (reader / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


#: Their examples need a model or a checkpoint; documents show them in full.
NEED_A_MODEL = (
    "analog_plugin.training.trainer.AnalogTrainer",
    "analog_integrations.optimum.modeling.AnalogModelForCausalLM",
)
#: Triton comes with torch's builds for GPUs.
NEED_TRITON = ("analog_plugin.ops.kernels", "analog_plugin.training.kernels")


def test_examples_in_docstrings_give_what_they_say():
    examples = []
    for package in ("analog_plugin", "analog_integrations"):
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, f"{package}."):
            if found.name in NEED_TRITON and importlib.util.find_spec("triton") is None:
                continue
            examples += doctest.DocTestFinder().find(importlib.import_module(found.name))
    examples = [example for example in examples if example.examples]
    assert set(NEED_A_MODEL) <= {example.name for example in examples}
    told: list[str] = []
    for example in examples:
        if not example.name.startswith(NEED_A_MODEL):
            doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert "".join(told) == ""
