"""``optimum-cli analog generate`` and ``main_generate``: shards that survive any interruption."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny

from analog_integrations.optimum.arguments import count_of
from analog_integrations.optimum.generate import chosen_shards
from analog_integrations.ray.work import make_shards_with_ray
from analog_plugin import AnalogError
from analog_plugin.data.shards import ShardRows, ShardStore
from analog_plugin.pretrained import load_causal_lm
from optimum.analog import main_generate

CLI = Path(sys.executable).with_name("optimum-cli")
SMALL = {"tokens": 160, "sequence_length": 8, "shards": 5, "batch_size": 3, "device": "cpu"}


def command(*arguments):
    return [str(CLI), "analog", "generate", *map(str, arguments)]


def run(*arguments, cwd):
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd)


def hashes(directory):
    """Of all files but what may differ: nothing."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(directory).iterdir()
        if not path.name.startswith(".")
    }


def test_help_explains_the_command_without_loading_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    result = subprocess.run(
        command("--help"), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for text in ("--tokens", "--shard", "--merge", "examples:"):
        assert text in result.stdout


def test_killed_and_started_again_it_makes_the_shards_of_an_unbroken_run(model_directory, tmp_path):
    arguments = {"tokens": 12_000, "sequence_length": 40, "shards": 60, "batch_size": 5}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("--model", model_directory, "--device", "cpu", *options, "out"),
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 120
    while len(list(out.glob("shard-*.json"))) < 3 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {name: digest for name, digest in hashes(out).items() if name.endswith("json")}
    assert 3 < len(finished) < 61
    work = main_generate(str(model_directory), out, device="cpu", **arguments)
    assert work.made and len(work.kept) == len(finished) - 1
    main_generate(str(model_directory), tmp_path / "unbroken", device="cpu", **arguments)
    assert hashes(out) == hashes(tmp_path / "unbroken")
    assert finished.items() <= hashes(out).items()
    assert [path.name for path in out.iterdir() if "partial" in path.name] == []


def test_the_command_merges_and_names_what_is_missing(model_directory, tmp_path):
    main_generate(str(model_directory), tmp_path / "out", shard="0-2,4", **SMALL)
    incomplete = run("--merge", "out", cwd=tmp_path)
    assert incomplete.returncode == 1
    assert incomplete.stderr.strip().splitlines()[-1].startswith("error: out is not complete")
    main_generate(
        str(model_directory), tmp_path / "out", shard=3, merge=True, validation=0.2, **SMALL
    )
    rows = ShardRows(tmp_path / "out")
    assert rows.shape == (16, 8) and ShardRows(tmp_path / "out", "validation").shape == (4, 8)
    assert (rows[:][:, 0] == 1).all()


def test_documents_that_end_are_packed(tmp_path):
    model = tiny(num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    model.save_pretrained(tmp_path / "model")
    options = SMALL | {"tokens": 4000, "shards": 2}
    main_generate(str(tmp_path / "model"), tmp_path / "out", ignore_eos=False, **options)
    rows = ShardRows(tmp_path / "out")[:]
    stream = rows.flatten().tolist()
    after = [following for token, following in itertools.pairwise(stream) if token == 2]
    assert len(after) > 10 and set(after) == {1}
    assert stream.count(1) > len(rows)


@pytest.mark.slow
def test_ray_workers_make_the_shards_of_one_process(model_directory, tmp_path):
    ray = pytest.importorskip("ray")
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray's workers have
    try:
        main_generate(str(model_directory), tmp_path / "one", **SMALL)
        path = tmp_path / "ray"
        main_generate(str(model_directory), path, shard="1,3", **SMALL)
        work = main_generate(str(model_directory), path, backend="ray", workers=2, **SMALL)
        assert work.made == [0, 2, 4] and work.kept == [1, 3]
        assert hashes(path) == hashes(tmp_path / "one")
        with pytest.raises(AnalogError, match="numbered from 0 to 4"):
            main_generate(str(model_directory), path, backend="ray", shard=7, **SMALL)
        store = ShardStore(path)
        store.path_of(2).unlink()
        with pytest.raises(AnalogError, match="model /nowhere is neither a local model directory"):
            make_shards_with_ray(store, partial(load_causal_lm, "/nowhere"))
    finally:
        torch.set_num_threads(torch_threads)
        ray.shutdown()


def test_without_vllm_its_backend_says_so(model_directory, tmp_path):
    with pytest.raises(AnalogError, match="needs vLLM, which is not installed"):
        main_generate(str(model_directory), tmp_path / "out", backend="vllm", **SMALL)


@pytest.mark.parametrize(
    ("text", "number"),
    [("20B", 20 * 10**9), ("500M", 5 * 10**8), ("10k", 10_000), ("1.5M", 1_500_000), (7, 7),
     ("1T", 10**12), ("0.001k", 1)],
)  # fmt: skip
def test_numbers_of_tokens_are_written_short(text, number):
    assert count_of(text) == number


@pytest.mark.parametrize("text", ["", "B", "20 B", "-1", "1e9", "0", "0.5", "20b", True, 1.5, "٣k"])
def test_other_numbers_are_refused(text):
    with pytest.raises(AnalogError, match="tokens is"):
        count_of(text)


def test_shards_are_chosen_by_number_range_and_list():
    assert chosen_shards("1,4,7-9") == [1, 4, 7, 8, 9]
    assert chosen_shards(3) == [3] and chosen_shards(range(2)) == [0, 1]
    for text in ("", "a", "3-1", "1,,2", "-1", "0-999999"):
        with pytest.raises(AnalogError, match="shard is"):
            chosen_shards(text)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"tokens": None}, "tokens and sequence_length are needed"),
     ({"sequence_length": 65}, "sequence_length is 65, but the model allows at most 64"),
     ({"shards": 30}, "20 rows are fewer than 30 shards"),
     ({"shard": 9}, "5 shards are numbered from 0 to 4"),
     ({"temperature": 0.0}, "temperature is 0.0"), ({"bos_token_id": 128}, "ids run from 0 to 127"),
     ({"backend": "tpu"}, "backend is 'tpu'"), ({"workers": 2}, "write --backend ray"),
     ({"validation": 0.1}, "write --merge"), ({"revision": "main"}, "is no hub model"),
     ({"device": "nowhere"}, "device 'nowhere' cannot be used")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_one_sentence_and_nothing_is_sampled(
    changes, told, model_directory, tmp_path
):
    with pytest.raises(AnalogError, match=told) as caught:
        main_generate(str(model_directory), tmp_path / "out", **(SMALL | changes))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("out/shard-*")) == []


def test_another_model_of_the_same_name_is_refused(model_directory, tmp_path):
    main_generate(str(model_directory), tmp_path / "out", shard=0, **SMALL)
    tiny(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(AnalogError, match=r"another request \(fingerprint "):
        main_generate(str(tmp_path / "other"), tmp_path / "out", **SMALL)


def test_nothing_to_do_is_refused(tmp_path):
    with pytest.raises(AnalogError, match="give a model to sample from, or --merge"):
        main_generate(None, tmp_path)


def test_a_request_of_somebody_elses_is_refused(model_directory, tmp_path):
    main_generate(str(model_directory), tmp_path / "out", shard=0, **SMALL)
    path = tmp_path / "out" / "request.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shards": "many"}))
    with pytest.raises(AnalogError, match=r"request.json cannot be read: shards is wrong "):
        main_generate(str(model_directory), tmp_path / "out", **SMALL)
