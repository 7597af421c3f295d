"""Training on shards is training on the same rows in memory."""

import copy
import json

import pytest
import torch
import yaml
from tiny_models import VOCABULARY, tiny, token_ids

from analog_plugin import AnalogError, save_checkpoint
from analog_plugin.data.shards import ShardRequest, ShardRows, ShardStore, merge_shards
from analog_plugin.data.shards.records import made_with
from analog_plugin.training.pipeline import train_analog
from analog_plugin.training.stored import store_teacher

ROWS, LENGTH = 20, 12
MADE = made_with("cpu", "torch")


@pytest.fixture
def shards(tmp_path):
    """A directory of four shards of other tokens, one of them for validation."""
    fields = {
        "model": "tiny", "fingerprint": "f", "vocabulary": VOCABULARY, "tokens": ROWS * LENGTH,
        "sequence_length": LENGTH, "shards": 4, "seed": 0, "bos_token_id": 1, "temperature": 1.0,
        "batch_size": 4,
    }  # fmt: skip
    store = ShardStore.begin(tmp_path / "shards", ShardRequest(**fields))
    for shard in range(4):
        store.write(shard, token_ids(ROWS // 4, LENGTH, seed=shard), MADE)
    merge_shards(store.directory, validation=0.25)
    return store.directory


@pytest.fixture
def recipe(shards):
    def make(**data):
        return {
            "scheme": {"tile_rows": 48}, "data": {"source": str(shards)} | data,
            "training": {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
                         "dataloader_num_workers": 0},
            "evaluation": None,
        }  # fmt: skip

    return make


def trained(recipe, dataset=None):
    result = train_analog(tiny(num_hidden_layers=1), recipe, dataset=dataset)
    losses = [entry["loss"] for entry in result.training["loss_history"]]
    return losses, result


def test_it_is_the_training_on_the_same_rows_in_memory(shards, recipe):
    losses, result = trained(recipe())
    rows = ShardRows(shards)
    assert len(rows) == 15 and result.training["dataset_tokens"] == 15 * LENGTH
    assert result.training["sequence_length"] == LENGTH
    expected, other = trained(recipe(), dataset=rows[:])
    assert losses == expected and len(losses) == 3
    for one, two in zip(result.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_other_processes_may_read_the_rows(recipe):
    expected, _ = trained(recipe())
    fields = recipe()
    fields["training"] |= {"dataloader_num_workers": 2}
    assert trained(fields)[0] == expected


def test_fewer_tokens_are_the_first_rows(shards, recipe):
    losses, result = trained(recipe(tokens=8 * LENGTH, sequence_length=LENGTH))
    assert result.training["dataset_tokens"] == 8 * LENGTH
    assert losses == trained(recipe(), dataset=ShardRows(shards)[:8])[0]


def test_a_teacher_is_stored_for_them(shards, recipe, tmp_path):
    model = tiny(num_hidden_layers=1)
    stored = store_teacher(
        copy.deepcopy(model), ShardRows(shards), tmp_path / "teacher", top_k=4, rows_per_file=4
    )
    fields = recipe() | {"distillation": {"teacher": str(tmp_path / "teacher"), "top_k": 4}}
    losses, _ = trained(fields)
    assert len(stored) == 15 and len(losses) == 3
    assert losses == trained(fields, dataset=ShardRows(shards)[:])[0]
    with pytest.raises(AnalogError, match="is for another set of training tokens"):
        trained(fields, dataset=ShardRows(shards)[1:])


def test_the_recipe_of_a_checkpoint_runs_again(recipe, tmp_path):
    fields = recipe()
    _, result = trained(fields)
    directory = save_checkpoint(result.model, tmp_path / "out", result=result)
    kept = yaml.safe_load((directory / "analog" / "recipe.yaml").read_text())
    again = kept["analog_stage"]["analog_modifiers"]["AnalogModifier"]
    assert again["data"] == fields["data"]
    assert trained(again)[0] == trained(fields)[0]


@pytest.mark.parametrize(
    ("data", "told"),
    [({"sequence_length": 16}, "write data: {sequence_length: 12}"),
     ({"tokens": 10**6}, "has 15 rows for train, but 83333 were asked for")],
    ids=["length", "tokens"],
)  # fmt: skip
def test_settings_that_they_do_not_have_are_refused(data, told, recipe):
    with pytest.raises(AnalogError, match=told):
        trained(recipe(**data))


def test_shards_of_a_larger_vocabulary_are_refused(recipe):
    with pytest.raises(AnalogError, match=r"holds the token id .* run from 0 to 63"):
        train_analog(tiny(num_hidden_layers=1, vocab_size=64), recipe())


def damage_a_page(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x"), damage_a_page],
    ids=["gone", "cut", "damaged"],
)  # fmt: skip
def test_a_shard_that_cannot_be_read_is_named(damage, shards, recipe):
    index = json.loads((shards / "index.json").read_text())
    path = shards / index["splits"]["train"][1]
    damage(path)
    with pytest.raises(AnalogError, match=path.name) as caught:
        trained(recipe())
    assert "\n" not in str(caught.value)
