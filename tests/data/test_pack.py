import torch
from hypothesis import given
from hypothesis import strategies as st

from analog_plugin.data import pack_documents

documents = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=9)


@given(documents, st.integers(1, 12))
def test_rows_hold_the_stream_in_order_and_drop_less_than_a_row(docs, length):
    rows = pack_documents(docs, length)
    stream = [token for document in docs for token in document]
    assert rows.dtype == torch.long and rows.shape == (len(stream) // length, length)
    assert rows.flatten().tolist() == stream[: rows.numel()]
    assert len(stream) - rows.numel() < length


@given(documents, st.integers(1, 12))
def test_tensors_and_lists_are_packed_alike(docs, length):
    tensors = [torch.tensor(document, dtype=torch.int32) for document in docs]
    assert torch.equal(pack_documents(tensors, length), pack_documents(docs, length))


def test_no_document_gives_no_row():
    assert pack_documents([], 4).shape == (0, 4)


def test_an_iterator_is_read_once():
    assert pack_documents(iter([[1, 2], [3]]), 3).tolist() == [[1, 2, 3]]
