"""Shards: the same tokens whoever makes them and however often, and rows read one by one."""

import hashlib
import json
import multiprocessing
import pickle
import threading
import time

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import VOCABULARY, tiny
from torch.utils.data import DataLoader

from analog_plugin import AnalogError
from analog_plugin.data import generate_dataset
from analog_plugin.data.shards import (
    ModelSampler,
    ShardRequest,
    ShardRows,
    ShardStore,
    make_shards,
    merge_shards,
)

LENGTH = 8


def request(**changes):
    fields = {
        "model": "tiny", "fingerprint": "f", "vocabulary": VOCABULARY, "tokens": 20 * LENGTH - 3,
        "sequence_length": LENGTH, "shards": 6, "seed": 3, "bos_token_id": 1, "temperature": 1.0,
        "batch_size": 3,
    }  # fmt: skip
    return ShardRequest(**(fields | changes))


@pytest.fixture(scope="module")
def model():
    return tiny(num_hidden_layers=1)


@pytest.fixture
def make(model, tmp_path):
    """Makes shards in a directory of that name."""

    def make(name="shards", only=None, **changes):
        store = ShardStore.begin(tmp_path / name, request(**changes))
        work = make_shards(store, lambda: ModelSampler(model, store.request), only)
        return store, work

    return make


def files(store):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in store.directory.iterdir()
        if not path.name.startswith(".")
    }


def no_sampler():
    pytest.fail("something was sampled")


def test_shards_together_hold_the_rows_that_were_asked_for(make):
    store, work = make()
    assert work.made == list(range(6)) and work.kept == []
    tables = [pq.read_table(store.path_of(shard)) for shard in range(6)]
    rows = [row for table in tables for row in table["input_ids"].to_pylist()]
    assert [table.num_rows for table in tables] == [4, 4, 3, 3, 3, 3]
    assert len(rows) == 20 and {len(row) for row in rows} == {LENGTH}
    assert {row[0] for row in rows} == {1} and len({tuple(row) for row in rows}) == 20


def test_a_shard_is_sampled_as_a_dataset_with_its_seed_is(make, model):
    store, _ = make(only=[2])
    manifest = store.read_manifest(2)
    expected = generate_dataset(
        model, 3 * LENGTH, LENGTH, batch_size=3, seed=manifest.seed, cache=False
    )
    found = torch.tensor(pq.read_table(store.path_of(2))["input_ids"].to_pylist())
    assert torch.equal(found, expected)


def test_a_manifest_tells_how_a_shard_was_made(make):
    store, _ = make(only=[5])
    manifest = json.loads(store.manifest_of(5).read_text())
    data = store.path_of(5).read_bytes()
    rows = torch.tensor(pq.read_table(store.path_of(5))["input_ids"].to_pylist())
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["bytes"] == len(data)
    ids = rows.numpy().astype("<i4").tobytes()
    assert manifest["tokens_sha256"] == hashlib.sha256(ids).hexdigest()
    assert manifest["tokens"] == rows.numel() and manifest["largest_token"] == int(rows.max())
    assert manifest["request"] == request().model_dump()
    assert manifest["made_with"]["versions"]["torch"] == torch.__version__
    assert manifest["made_with"]["device"].startswith("cpu")


def test_a_shard_depends_on_no_other_and_not_on_their_order(make):
    expected, _ = make("whole")
    other, _ = make("parts", only=[4, 1])
    make("parts", only=[5, 0, 3, 2])
    assert files(other) == files(expected)
    again, _ = make("again", only=[3])
    name = again.path_of(3).name
    assert files(again)[name] == files(expected)[name]


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"temperature": 0.5}, {"top_k": 2}, {"batch_size": 2}, {"bos_token_id": 7}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_of_the_sampling_counts(change, make):
    first, _ = make("first", only=[0])
    second, _ = make("second", only=[0], **change)
    one, other = (store.read_manifest(0).tokens_sha256 for store in (first, second))
    assert one != other


def test_whole_shards_are_left_and_only_missing_ones_made(make):
    store, _ = make(only=[0, 2])
    times = {shard: store.path_of(shard).stat().st_mtime_ns for shard in (0, 2)}
    _, work = make()
    assert work.made == [1, 3, 4, 5] and work.kept == [0, 2]
    assert times == {shard: store.path_of(shard).stat().st_mtime_ns for shard in (0, 2)}
    assert make_shards(store, no_sampler).kept == list(range(6))


def overwrite(path):
    path.write_bytes(b"damaged")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = pytest.mark.parametrize(
    "damage", [overwrite, truncate, flip_a_byte, lambda path: path.unlink()],
    ids=["overwritten", "truncated", "a byte flipped", "gone"],
)  # fmt: skip


@DAMAGES
@pytest.mark.parametrize("part", ["parquet", "manifest"])
def test_a_damaged_shard_is_named_and_made_again(damage, part, make, capsys):
    store, _ = make()
    whole = files(store)
    damage(store.path_of(4) if part == "parquet" else store.manifest_of(4))
    with pytest.raises(AnalogError, match=r"is not complete \(shard 4: .*--shard 4\."):
        merge_shards(store.directory)
    capsys.readouterr()
    _, work = make()
    assert work.made == [4] and files(store) == whole
    told = capsys.readouterr().out
    missing = part == "manifest" and damage is DAMAGES.args[1][3]
    assert ("Shard 4 is damaged" in told) == (not missing)


@pytest.mark.parametrize("name", ["manifest", "request"])
def test_a_fault_that_quotes_a_file_is_short(name, make):
    store, _ = make()
    path = store.manifest_of(4) if name == "manifest" else store.directory / "request.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"9" * 50_000: 1}))
    with pytest.raises(AnalogError, match=r"cannot be read: ") as caught:
        merge_shards(store.directory)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("change", "told"),
    [({"seed": 4}, "seed 3, not 4"), ({"tokens": 900}, "tokens 157, not 900"),
     ({"fingerprint": "g"}, "fingerprint f, not g"), ({"shards": 5}, "shards 6, not 5"),
     ({"backend": "vllm"}, "backend transformers, not vllm")],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)  # fmt: skip
def test_another_request_in_the_same_directory_is_refused_naming_what_differs(change, told, make):
    store, _ = make(only=[0])
    before = files(store)
    with pytest.raises(AnalogError, match=rf"another request \({told}\)"):
        make(**change)
    assert files(store) == before


def test_the_name_of_the_model_may_differ(make):
    make(only=[0])
    assert make(only=[0], model="/elsewhere/tiny")[1].kept == [0]


def test_a_shard_of_another_request_is_no_part_of_this_one(make):
    store, _ = make("one")
    other, _ = make("other", seed=9)
    for path in (other.path_of(1), other.manifest_of(1)):
        (store.directory / path.name).write_bytes(path.read_bytes())
    with pytest.raises(AnalogError, match=r"shard 1: it is of another request \(seed 9, not 3\)"):
        merge_shards(store.directory)


def test_a_directory_with_something_else_is_refused(make, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "letters.txt").write_text("x")
    with pytest.raises(AnalogError, match=r"holds letters.txt but no request.json"):
        make()
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["letters.txt"]


@pytest.mark.parametrize("shard", [-1, 6])
def test_a_shard_that_is_none_is_refused(shard, make):
    with pytest.raises(AnalogError, match="6 shards are numbered from 0 to 5"):
        make(only=[shard])


def work_in_a_process(directory, model):
    torch.set_num_threads(1)
    store = ShardStore.begin(directory, request())
    make_shards(store, lambda: ModelSampler(model, store.request))


def processes(count, *arguments):
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=work_in_a_process, args=arguments, daemon=True) for _ in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def test_four_workers_make_the_set_that_one_makes(make, model, tmp_path):
    expected, _ = make("one")
    assert processes(4, tmp_path / "four", model) == [0] * 4
    assert files(ShardStore(tmp_path / "four")) == files(expected)


def test_two_that_start_the_same_shard_leave_it_whole(make, model):
    """Without locks, as on file systems that have none: threads share those of their process."""
    store, _ = make(only=[])
    rows = ModelSampler(model, store.request).sample(4, store.request.seed_of(0))
    made = ModelSampler(model, store.request).made_with
    barrier = threading.Barrier(4)

    def write():
        barrier.wait()
        for _ in range(10):
            ShardStore(store.directory).write(0, rows, made)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.fault(0) is None
    leftover = [path.name for path in store.directory.iterdir() if "partial" in path.name]
    assert leftover == []


def test_a_shard_that_another_process_makes_is_waited_for(make, model):
    store, _ = make(only=[])
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()

    def hold():
        own = ShardStore(store.directory)
        with own.claimed(2, wait=True):
            held.set()
            release.wait(60)

    other = context.Process(target=hold, daemon=True)
    other.start()
    assert held.wait(60)
    with store.claimed(2, wait=False) as ours:
        assert not ours

    def release_at_the_end():
        while not store.manifest_of(5).exists():
            time.sleep(0.01)
        release.set()

    threading.Thread(target=release_at_the_end, daemon=True).start()
    work = make_shards(store, lambda: ModelSampler(model, store.request))
    other.join(60)
    assert work.made == [0, 1, 3, 4, 5, 2]


def test_merged_shards_are_split_by_the_seed_and_load_with_datasets(make):
    store, _ = make()
    index = merge_shards(store.directory, validation=0.34)
    assert index == merge_shards(store.directory, validation=0.34)
    splits = json.loads((store.directory / "index.json").read_text())["splits"]
    assert len(splits["train"]) == 4 and len(splits["validation"]) == 2
    loaded = datasets.load_dataset("parquet", data_dir=str(store.directory), data_files=splits)
    by_card = datasets.load_dataset(str(store.directory))
    for name in ("train", "validation"):
        rows = ShardRows(store.directory, name)
        assert torch.equal(rows[:], torch.tensor(loaded[name]["input_ids"][:]))
        assert by_card[name]["input_ids"][:] == loaded[name]["input_ids"][:]
        assert index.rows[name] == len(rows) and index.tokens[name] == rows.numel()
    other, _ = make("other", seed=8)
    drawn = merge_shards(other.directory, validation=0.34).splits["validation"]
    assert len(drawn) == 2 and drawn != splits["validation"]


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.01, "less than one of 6 shards; write 0.167"), (0.7, "between 0 and 0.5"),
     (float("nan"), "between 0 and 0.5")],
)  # fmt: skip
def test_a_share_that_cannot_be_is_refused(share, told, make):
    store, _ = make()
    with pytest.raises(AnalogError, match=told):
        merge_shards(store.directory, validation=share)


def test_an_incomplete_set_is_neither_merged_nor_read(make):
    store, _ = make(only=[0, 1, 2, 4])
    with pytest.raises(AnalogError, match=r"shard 3: it is not there; shard 5: .*--shard 3,5\."):
        merge_shards(store.directory)
    with pytest.raises(AnalogError, match=r"shard 3: it is not there"):
        ShardRows(store.directory)


def test_rows_are_those_of_the_files_in_any_order(make, monkeypatch):
    monkeypatch.setattr("analog_plugin.data.shards.parquet._TOKENS_OF_A_GROUP", 2 * LENGTH)
    monkeypatch.setattr("analog_plugin.data.shards.rows._KEPT", 2)
    monkeypatch.setattr("analog_plugin.data.shards.rows._OPEN", 2)
    store, _ = make()
    tables = [pq.read_table(store.path_of(shard)) for shard in range(6)]
    whole = torch.tensor([row for table in tables for row in table["input_ids"].to_pylist()])
    rows = ShardRows(store.directory)
    assert rows.shape == (20, LENGTH) and len(rows) == 20 and rows.numel() == whole.numel()
    for index in [19, 0, 7, 3, 4, 19, -1, -20, 11]:
        assert torch.equal(rows[index], whole[index]) and rows[index].dtype == torch.long
    assert torch.equal(rows[3:9], whole[3:9]) and torch.equal(rows[::7], whole[::7])
    assert rows[5:5].shape == (0, LENGTH)
    assert torch.equal(ShardRows(store.directory, rows=7)[:], whole[:7])
    assert torch.equal(pickle.loads(pickle.dumps(rows))[:], whole)
    with pytest.raises(IndexError):
        rows[20]
    loader = DataLoader(rows, batch_size=3, shuffle=True, num_workers=2)
    found = torch.cat(list(loader))
    assert sorted(found.tolist()) == sorted(whole.tolist())


def test_more_rows_than_there_are_and_an_unknown_split_are_refused(make):
    store, _ = make()
    with pytest.raises(AnalogError, match="has 20 rows for train, but 21 were asked for"):
        ShardRows(store.directory, rows=21)
    with pytest.raises(AnalogError, match=r"no split 'validation'; merge the shards with"):
        ShardRows(store.directory, "validation")


def test_a_flipped_byte_is_found_when_its_row_is_read(make):
    """Sizes agree, and nothing was merged since: the page's checksum tells."""
    store, _ = make()
    path = store.path_of(3)
    whole, named = path.read_bytes(), 0
    data_ends = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start, size = data_ends.data_page_offset, data_ends.total_compressed_size
    for at in range(start, start + size):
        data = bytearray(whole)
        data[at] ^= 0x10
        path.write_bytes(bytes(data))
        try:
            found = ShardRows(store.directory)[:]
        except AnalogError as error:
            assert path.name in str(error) and "\n" not in str(error)
            named += 1
        else:  # a byte of a page's header that says nothing about its tokens
            path.write_bytes(whole)
            assert torch.equal(found, ShardRows(store.directory)[:])
    assert named > size / 2  # the rest is the page's header


@pytest.mark.parametrize(
    "changes",
    [{"shards": 21}, {"shards": 0}, {"tokens": 0}, {"sequence_length": 1}, {"temperature": 0.0},
     {"temperature": float("nan")}, {"top_k": 0}, {"batch_size": 0}, {"seed": -1},
     {"tokens": 2**40, "shards": 2}, {"dtype": "float64"}, {"unknown": 1}],
    ids=str,
)  # fmt: skip
def test_impossible_requests_are_no_requests(changes):
    with pytest.raises(ValueError):
        request(**changes)
