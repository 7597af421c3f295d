import json

import datasets
import pytest
import torch

from analog_plugin import AnalogError
from analog_plugin.data import load_tokens

DOCUMENTS = [(7, 0), (12, 7), (0, 0), (9, 19)]  # words, first word; the third is empty
STREAM = [i % 60 + 5 for i in range(28)]


@pytest.fixture
def texts(words):
    return [words(count, start) for count, start in DOCUMENTS]


@pytest.fixture
def write(tmp_path, texts):
    """The same documents in each format."""

    def make(kind):
        data = datasets.Dataset.from_dict({"text": texts})
        if kind == "dataset":
            return data
        if kind in ("directory", "split directory"):
            path = tmp_path / "saved"
            split = datasets.DatasetDict({"test": data.select([0]), "train": data})
            (data if kind == "directory" else split).save_to_disk(str(path))
            return path
        path = tmp_path / f"data.{kind}"
        if kind in ("txt", "md"):
            path.write_text("\n".join(texts))
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        elif kind == "json":
            path.write_text(json.dumps([{"text": text} for text in texts]))
        else:
            data.to_parquet(str(path))
        return path

    return make


KINDS = ["txt", "md", "jsonl", "json", "parquet", "directory", "split directory", "dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(kind, write, tokenizer):
    rows = load_tokens(write(kind), tokenizer, 9)
    assert rows.dtype == torch.long
    assert rows.tolist() == [STREAM[:9], STREAM[9:18], STREAM[18:27]]


def test_a_path_may_be_text(write, tokenizer):
    path = write("txt")
    assert torch.equal(load_tokens(str(path), tokenizer, 9), load_tokens(path, tokenizer, 9))


def test_a_dataset_dictionary_gives_its_training_split(write, tokenizer, words):
    train = write("dataset")
    other = datasets.Dataset.from_dict({"text": [words(40, 30)]})
    both = datasets.DatasetDict({"validation": other, "train": train})
    assert torch.equal(load_tokens(both, tokenizer, 9), load_tokens(train, tokenizer, 9))


def test_a_dataset_of_token_ids_needs_no_tokenizer():
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8]]})
    assert load_tokens(data, None, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_another_column_can_hold_the_text(tokenizer, words):
    data = datasets.Dataset.from_dict({"title": ["w1"], "story": [words(6)]})
    rows = load_tokens(data, tokenizer, 6, text_column="story")
    assert rows.tolist() == [STREAM[:6]]


def test_each_document_begins_as_the_tokenizer_begins_it(bos_tokenizer, words):
    data = datasets.Dataset.from_dict({"text": [words(3), words(3)]})
    assert load_tokens(data, bos_tokenizer, 8).tolist() == [[1, 5, 6, 7, 1, 5, 6, 7]]


@pytest.mark.parametrize(("tokens", "rows"), [(None, 3), (27, 3), (26, 2), (18, 2), (9, 1), (4, 1)])
def test_tokens_limits_the_rows_but_leaves_at_least_one(tokens, rows, write, tokenizer):
    found = load_tokens(write("jsonl"), tokenizer, 9, tokens=tokens)
    assert found.tolist() == [STREAM[:9], STREAM[9:18], STREAM[18:27]][:rows]


def test_documents_beyond_the_limit_are_not_read(tokenizer, words):
    def endless():
        while True:
            yield {"text": words(10)}

    data = datasets.IterableDataset.from_generator(endless)
    assert load_tokens(data, tokenizer, 8, tokens=24).shape == (3, 8)


@pytest.mark.parametrize("name", ["missing.txt", "missing/directory", "owner/not-a-dataset"])
def test_a_source_that_does_not_exist_is_named(name, tokenizer):
    with pytest.raises(AnalogError, match=f"dataset {name} is neither a readable local file"):
        load_tokens(name, tokenizer, 9)


def test_a_directory_without_a_dataset_is_named(tmp_path, tokenizer):
    (tmp_path / "notes.log").write_text("w1")
    with pytest.raises(AnalogError, match="is neither a readable local file or directory"):
        load_tokens(tmp_path, tokenizer, 9)


def test_an_unknown_ending_lists_the_known_ones(tmp_path, tokenizer):
    path = tmp_path / "data.csv"
    path.write_text("text\nw1\n")
    with pytest.raises(AnalogError, match=r"ending '\.csv'; give one of \.txt, .*\.parquet"):
        load_tokens(path, tokenizer, 9)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_an_empty_file_is_named(kind, tmp_path, tokenizer):
    path = tmp_path / f"none.{kind}"
    path.write_bytes(b"")
    with pytest.raises(AnalogError, match=rf"none\.{kind} is empty"):
        load_tokens(path, tokenizer, 9)


def test_a_damaged_file_is_named(tmp_path, tokenizer):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"not a parquet file")
    with pytest.raises(AnalogError, match=r"broken\.parquet is neither a readable"):
        load_tokens(path, tokenizer, 9)


def test_a_missing_text_column_says_which_there_are(tokenizer):
    data = datasets.Dataset.from_dict({"story": ["w1"], "title": ["w2"]})
    with pytest.raises(AnalogError, match=r"no column 'text'; it has story, title: write data: "):
        load_tokens(data, tokenizer, 9)


def test_text_without_a_tokenizer_is_refused(write):
    with pytest.raises(AnalogError, match="a tokenizer is needed"):
        load_tokens(write("jsonl"), None, 9)


def test_less_than_one_row_is_refused(write, tokenizer):
    with pytest.raises(AnalogError, match="shorter than one sequence of 29 tokens"):
        load_tokens(write("txt"), tokenizer, 29)


def test_a_dataset_without_rows_is_refused(tokenizer):
    with pytest.raises(AnalogError, match="empty or shorter"):
        load_tokens(datasets.Dataset.from_dict({"text": []}), tokenizer, 9)


WRONG = {
    "text of numbers": ([{"text": 5}], "column 'text' .* holds 5, but must hold text"),
    "ids of words": ([{"input_ids": ["a"]}], r"holds \['a'\], but must hold lists of token ids"),
    "ids of fractions": ([{"input_ids": [1.5]}], "lists of token ids"),
    "nested ids": ([{"input_ids": [[1, 2]]}], "lists of token ids"),
    "no ids": ([{"input_ids": None}], "lists of token ids"),
    "rows without columns": ([["w1"]], "a row must map columns"),
    "rows of tensors": ([torch.ones(3, 3)], "a row must map columns"),
    "a number": (5, "The dataset is 5"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG.keys())
def test_rows_that_hold_something_else_are_one_sentence(data, message, tokenizer):
    with pytest.raises(AnalogError, match=message) as caught:
        load_tokens(data, tokenizer, 4)
    assert "\n" not in str(caught.value)


def test_special_tokens_can_be_left_out(bos_tokenizer, words):
    data = [{"text": words(3)}, {"text": words(3)}]
    assert load_tokens(data, bos_tokenizer, 6, special_tokens=False).tolist() == [[5, 6, 7] * 2]
