import shutil

import pytest
import yaml
from lightning_models import lightning_config, lightning_model, publish
from tiny_models import tiny, token_ids, word_tokenizer

from analog_plugin import AnalogScheme, calibrate_ranges, convert_to_analog, save_checkpoint
from analog_plugin.pretrained import load_causal_lm, load_tokenizer


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A tiny Llama with a tokenizer, on disk."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoints(model_directory, tmp_path_factory):
    """The tiny model as analog checkpoint and as int8 one."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = convert_to_analog(
        load_causal_lm(model_directory).float().eval(), AnalogScheme(tile_rows=32)
    )
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    tokenizer = load_tokenizer(model_directory)
    for name in ("analog-fp", "w8a8"):
        save_checkpoint(model, root / name, profile=name, tokenizer=tokenizer)
    return root


@pytest.fixture(scope="session")
def analog_directory(checkpoints):
    return checkpoints / "analog-fp"


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A tiny model as aihwkit-lightning's are published."""
    config = lightning_config(32)
    theirs = lightning_model("llama", config)
    return publish(theirs, config, tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def altered(published, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(published, tmp_path / "altered")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(" ".join(f"w{(i * i + 3 * i) % 124}" for i in range(600)))
    return path


@pytest.fixture
def fields():
    """A recipe that takes a second."""
    return {
        "scheme": {
            "preset": "AFM",
            "tile_rows": 32,
            "range_init_in_training": False,
            "range_init_batches": 2,
        },
        "data": {"source": "self", "tokens": 128, "sequence_length": 16},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "evaluation": None,
    }


@pytest.fixture
def write_recipe(tmp_path):
    def write(fields, name="recipe.yaml"):
        path = tmp_path / name
        stage = {"analog_stage": {"analog_modifiers": {"AnalogModifier": fields}}}
        path.write_text(yaml.safe_dump(stage))
        return path

    return write
