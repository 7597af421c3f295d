"""Training tokens from text, JSONL, parquet, a ``datasets`` directory or a hub dataset."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analog_plugin.data.pack import pack_documents
from analog_plugin.errors import AnalogError

_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


def load_tokens(
    source: Any,
    tokenizer: Any,
    sequence_length: int,
    *,
    tokens: int | None = None,
    text_column: str = "text",
    special_tokens: bool = True,
) -> Tensor:
    """Read a dataset and pack it into rows of token ids [rows, sequence_length].

    Args:
        source: A local ``.txt``, ``.jsonl``/``.json`` or ``.parquet`` file; a directory made by
            ``Dataset.save_to_disk``; a hub dataset's id; or a ``datasets.Dataset``.
        tokenizer: Turns text into ids; a dataset with a column ``input_ids`` needs none.
        sequence_length: Tokens of a row.
        tokens: Stop after so many; None: take all.
        text_column: The column that holds the text.
        special_tokens: Whether documents begin and end with the tokens that the tokenizer puts
            there.

    Raises:
        AnalogError: The source does not exist, is empty or shorter than one row, or has no text.
    """
    dataset = open_dataset(source)
    documents = _documents(dataset, tokenizer, text_column, source, special_tokens)
    limit = None if tokens is None else max(tokens // sequence_length, 1) * sequence_length
    rows = pack_documents(_first(documents, limit), sequence_length)
    if rows.shape[0] == 0:
        raise AnalogError(
            f"The dataset {_shown(source)} is empty or shorter than one sequence of "
            f"{sequence_length} tokens; give more text or a smaller sequence_length."
        )
    return rows if limit is None else rows[: limit // sequence_length]


def open_dataset(source: Any) -> Any:
    """Open ``source`` as rows with columns; see :func:`load_tokens`."""
    import datasets

    if isinstance(source, datasets.DatasetDict):
        return source["train"] if "train" in source else next(iter(source.values()))
    if not isinstance(source, (str, Path)):
        if not isinstance(source, Iterable):
            raise AnalogError(
                f"The dataset is {source!r}, but must be a file, a directory, a hub id or a "
                "datasets.Dataset."
            )
        return source
    path = Path(source)
    try:
        if path.is_file():
            builder = _BUILDERS.get(path.suffix)
            if builder is None:
                raise AnalogError(
                    f"The dataset {path} has the ending {path.suffix!r}; give one of "
                    f"{', '.join(_BUILDERS)}, a datasets directory or a hub id."
                )
            if path.stat().st_size == 0:
                raise AnalogError(f"The dataset {path} is empty; give a file with text.")
            if builder == "text":
                return [{"text": path.read_text(encoding="utf-8")}]
            return datasets.load_dataset(builder, data_files=str(path), split="train")
        if path.is_dir():
            return open_dataset(datasets.load_from_disk(str(path)))
        return open_dataset(datasets.load_dataset(str(source)))
    except AnalogError:
        raise
    except Exception as error:  # datasets raises many types for one fault: it cannot be read
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AnalogError(
            f"The dataset {source} is neither a readable local file or directory nor a hub dataset "
            f"within reach ({first_line})."
        ) from error


def _documents(
    dataset: Any, tokenizer: Any, column: str, source: Any, special_tokens: bool
) -> Iterator[Tensor]:
    shown = _shown(source)
    for row in dataset:
        if not isinstance(row, Mapping):
            raise AnalogError(
                f"The dataset {shown} has the row {_brief(row)}, but a row must map columns to "
                "values."
            )
        if "input_ids" in row:
            yield _token_ids(row["input_ids"], shown)
            continue
        if column not in row:
            raise AnalogError(
                f"The dataset {shown} has no column {column!r}; it has "
                f"{', '.join(row)}: write data: {{text_column: {next(iter(row))}}}."
            )
        text = row[column]
        if tokenizer is None:
            raise AnalogError(
                f"The dataset {shown} holds text, so a tokenizer is needed; give "
                "tokenizer=, or a dataset with a column input_ids."
            )
        if text and not isinstance(text, str):
            raise AnalogError(
                f"The column {column!r} of the dataset {shown} holds {_brief(text)}, but must hold "
                "text; write data: {text_column: NAME}."
            )
        if text:
            ids = tokenizer(text, verbose=False, add_special_tokens=special_tokens)["input_ids"]
            yield torch.tensor(ids, dtype=torch.long)


def _token_ids(values: Any, shown: str) -> Tensor:
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0, 0)
    if ids.dim() != 1 or (ids.is_floating_point() and ids.numel()):
        raise AnalogError(
            f"The column 'input_ids' of the dataset {shown} holds {_brief(values)}, but must hold "
            "lists of token ids."
        )
    return ids.long()


def _first(documents: Iterable[Tensor], limit: int | None) -> Iterator[Tensor]:
    have = 0
    for document in documents:
        yield document
        have += len(document)
        if limit is not None and have >= limit:
            return


def _brief(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")


def _shown(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__
