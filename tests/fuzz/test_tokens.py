"""Shards of tokens, stored teachers and kept samples that others wrote."""

import json

import pytest
from fuzzing import fuzzed, garbled, garbled_json, survived
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny, token_ids

from analog_plugin.data import generate_dataset
from analog_plugin.data.shards import ShardRequest, ShardRows, ShardStore, merge_shards
from analog_plugin.data.shards.records import made_with
from analog_plugin.files import sha256_of
from analog_plugin.training.stored import MANIFEST, StoredTeacher, store_teacher

LENGTH = 8
FIRST = "rows-000000.safetensors"


@pytest.fixture(scope="module")
def model():
    return tiny(num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    request = ShardRequest(
        model="tiny", fingerprint="f", vocabulary=VOCABULARY, tokens=6 * LENGTH,
        sequence_length=LENGTH, shards=2, seed=0, bos_token_id=1, temperature=1.0, batch_size=4,
    )  # fmt: skip
    store = ShardStore.begin(root / "shards", request)
    for shard in range(2):
        store.write(shard, token_ids(3, LENGTH, seed=shard), made_with("cpu", "torch"))
    merge_shards(store.directory)
    store_teacher(model, token_ids(3, LENGTH), root / "teacher", top_k=3)
    generate_dataset(model, 6, 2, cache=root / "cache")
    return root


def content_of(saved, name, file):
    (path,) = (saved / name).rglob(file)
    return path.read_bytes()


@fuzzed(st.sampled_from(["request.json", "index.json", "shard-00001-of-00002.json"]), st.data())
def test_manifests_of_shards(saved, copied, file, data):
    directory = copied("shards", file, data.draw(garbled_json(content_of(saved, "shards", file))))
    with survived(directory):
        ShardRows(directory)[:]
    with survived(directory):
        merge_shards(directory, 0.5)


@fuzzed(st.data())
def test_files_of_shards(saved, copied, data):
    name = "shard-00001-of-00002.parquet"
    content = content_of(saved, "shards", name)
    made = data.draw(garbled(content) | garbled(content[::-1], within=400).map(lambda b: b[::-1]))
    directory = copied("shards", name, made)
    path = directory / "shard-00001-of-00002.json"
    manifest = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(manifest | {"bytes": len(made)}))
    with survived(directory):
        ShardRows(directory)[:]


@fuzzed(st.data())
def test_manifests_of_teachers(saved, copied, data):
    made = data.draw(garbled_json(content_of(saved, "teacher", MANIFEST)))
    directory = copied("teacher", MANIFEST, made)
    with survived(directory):
        teacher = StoredTeacher(directory)
        for index in range(min(len(teacher), 4)):
            teacher.row(index)


@fuzzed(st.data())
def test_files_of_teachers(saved, copied, data):
    content = content_of(saved, "teacher", FIRST)
    header = int.from_bytes(content[:8], "little") + 8
    directory = copied("teacher", FIRST, data.draw(garbled(content, within=header)))
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][0]["sha256"] = sha256_of(directory / FIRST)
    path.unlink()
    path.write_text(json.dumps(manifest))
    with survived(directory):
        teacher = StoredTeacher(directory)
        for index in range(len(teacher)):
            teacher.row(index)


@fuzzed(st.sampled_from(["tokens.safetensors", "manifest.json"]), st.data())
def test_kept_samples(saved, copied, model, file, data):
    content = content_of(saved, "cache", file)
    garble = garbled_json if file == "manifest.json" else garbled
    directory = copied("cache", file, data.draw(garble(content)))
    with survived(directory):
        assert generate_dataset(model, 6, 2, cache=directory).shape == (3, 2)
