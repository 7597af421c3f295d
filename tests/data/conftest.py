import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
    )


def word_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {word: i + 4 for i, word in enumerate(["a", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip


@pytest.fixture
def tokenizer():
    """One id per word, and nothing added."""
    return word_tokenizer()


@pytest.fixture
def bos_tokenizer():
    """One id per word, after a beginning-of-sequence token."""
    return word_tokenizer(bos=True)


@pytest.fixture
def words():
    """``words(start, count)``: text of consecutive words, over and over."""

    def make(count, start=0):
        return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))

    return make
