"""Shards that vLLM's engine samples: reproducible, and from the model's own distribution."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import tiny

from analog_plugin.data.shards import ShardRows, ShardStore

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
SHARDS = {"tokens": 640, "sequence_length": 16, "shards": 3, "batch_size": 4, "seed": 2}
GREEDY = {"tokens": 60, "sequence_length": 12, "top_k": 1}
SECOND = {"tokens": 8000, "sequence_length": 2, "batch_size": 64}
ENDING = {"tokens": 6000, "sequence_length": 12, "ignore_eos": False, "temperature": 2.0}


@pytest.fixture(scope="module")
def model(sizes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    made = tiny("llama", **sizes)
    made.save_pretrained(directory)
    return made, directory


@pytest.fixture(scope="module")
def made(model, engine, engine_variables, tmp_path_factory):
    """Directories of shards by name: two processes, of which the second makes one shard alone."""
    root = tmp_path_factory.mktemp("shards")
    jobs = [
        {"all": SHARDS, "greedy": GREEDY, "second": SECOND, "ending": ENDING},
        {"one": SHARDS | {"shard": 1}},
    ]
    for job in jobs:
        calls = [[str(model[1]), str(root / name), given] for name, given in job.items()]
        done = subprocess.run(
            [engine / "python", Path(__file__).with_name("generate_worker.py"), json.dumps(calls)],
            env=engine_variables | {"PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    return root


def test_a_shard_is_the_same_made_alone_in_another_process(made):
    whole, alone = ShardStore(made / "all"), ShardStore(made / "one")
    assert whole.read_manifest(1) == alone.read_manifest(1)
    assert whole.path_of(1).read_bytes() == alone.path_of(1).read_bytes()
    assert whole.request.backend == "vllm"
    assert any(name.startswith("vllm") for name in whole.read_manifest(1).made_with.versions)


def test_rows_begin_at_the_beginning_and_differ(made):
    rows = ShardRows(made / "all")[:]
    assert rows.shape == (40, 16) and (rows[:, 0] == 1).all()
    assert len(rows.unique(dim=0)) == 40


@torch.no_grad()
def test_top_k_of_one_is_greedy(made, model):
    rows = ShardRows(made / "greedy")[:]
    logits = model[0](rows).logits[:, :-1]
    chosen = logits.gather(-1, rows[:, 1:, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 1e-4


@torch.no_grad()
def test_tokens_follow_the_model(made, model):
    """Second tokens against their probabilities: a chi-squared test at 6 sigma."""
    rows = ShardRows(made / "second")[:]
    expected = model[0](torch.tensor([[1]])).logits[0, -1].softmax(-1).double() * len(rows)
    counts = torch.bincount(rows[:, 1], minlength=expected.numel()).double()
    usual = expected >= 5
    seen = torch.cat([counts[usual], counts[~usual].sum()[None]])
    wanted = torch.cat([expected[usual], expected[~usual].sum()[None]]).clamp_min(1e-9)
    freedom = int(usual.sum())
    assert freedom > 3
    assert float(((seen - wanted) ** 2 / wanted).sum()) < freedom + 6 * (2 * freedom) ** 0.5


def test_documents_that_end_are_packed(made):
    stream = ShardRows(made / "ending")[:].flatten().tolist()
    after = [stream[i + 1] for i, token in enumerate(stream[:-1]) if token == 2]
    assert after and set(after) == {1}
