import json

import pytest
import torch

from analog_plugin import AnalogError
from analog_plugin.data import evaluation_tokens


@pytest.fixture
def corpus(tmp_path, words):
    """A text whose n-th token is n modulo 60, plus 5."""

    def make(count):
        path = tmp_path / "corpus.txt"
        path.write_text(words(count))
        return path

    return make


def test_blocks_are_evenly_spaced(corpus, tokenizer):
    blocks = evaluation_tokens(tokenizer, 3, 4, corpus(40))  # ten blocks: the 0th, 3rd and 6th
    expected = [[(block * 4 + i) % 60 + 5 for i in range(4)] for block in (0, 3, 6)]
    assert blocks.tolist() == expected


def test_all_blocks_of_a_text_may_be_taken(corpus, tokenizer):
    blocks = evaluation_tokens(tokenizer, 10, 4, corpus(43))
    assert blocks.flatten().tolist() == [i + 5 for i in range(40)]


def test_the_same_blocks_come_every_time(corpus, tokenizer):
    path = corpus(50)
    first = evaluation_tokens(tokenizer, 4, 5, path)
    assert torch.equal(first, evaluation_tokens(tokenizer, 4, 5, str(path)))


def test_more_blocks_than_there_are_is_an_error(corpus, tokenizer):
    with pytest.raises(AnalogError, match=r"has 10 blocks of 4 tokens, .* write blocks: 10\."):
        evaluation_tokens(tokenizer, 11, 4, corpus(43))


def test_each_block_begins_as_the_tokenizer_begins_a_text(corpus, bos_tokenizer):
    blocks = evaluation_tokens(bos_tokenizer, 4, 6, corpus(60))
    assert blocks.shape == (4, 6)
    assert (blocks[:, 0] == 1).all()


def test_the_beginning_token_stands_only_at_the_beginning(corpus, bos_tokenizer):
    blocks = evaluation_tokens(bos_tokenizer, 4, 6, corpus(60))
    assert (blocks[:, 1:] != 1).all()


def test_other_formats_serve_as_a_corpus(tmp_path, tokenizer, words):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": words(10, 10 * i)}) + "\n" for i in range(4)))
    blocks = evaluation_tokens(tokenizer, 2, 8, path)
    assert blocks.tolist() == [list(range(5, 13)), list(range(21, 29))]


@pytest.mark.parametrize("which", ["tokenizer", "bos_tokenizer"])
def test_the_default_corpus_needs_no_file(which, request):
    tokenizer = request.getfixturevalue(which)
    blocks = evaluation_tokens(tokenizer, 16, 32)
    assert blocks.shape == (16, 32) and blocks.dtype == torch.long
    starts = bool((blocks[:, 0] == 1).all())
    assert starts == (which == "bos_tokenizer")
