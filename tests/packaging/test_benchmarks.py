"""The benchmarks run, write what they measured as JSON, and fill the page that shows it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TINY = {
    "linear": "--dtypes float32 --shapes 32x48 --tokens 8 --kept-tokens 16 --repeats 2",
    "loss": "--dtypes bfloat16 --tokens 16 --vocabulary 64 --hidden 16 --repeats 2",
    "step": "--dtypes float32,bfloat16 --model tiny --rows 2 --length 8 --repeats 2",
    "noise": "--model tiny --repeats 2",
    "generate": "--model tiny --rows 2 --length 4 --repeats 2",
}
PEERS = {
    "linear": {
        "nn.Linear",
        "nn.Linear and the draw",
        "nn.Linear, the draw and the passes",
        "analog-plugin",
        "analog-plugin, noise drawn again",
        "aihwkit-lightning",
        "aihwkit",
        "torchao",
    },
    "loss": {"whole logits", "analog-plugin", "liger-kernel"},
    "step": {"fine-tuning", "distillation", "analog-plugin", "aihwkit-lightning"},
    "generate": {"model.generate", "analog-plugin"},
    "noise": {"weight + sigma * randn", "analog-plugin", "aihwkit"},
}


@pytest.fixture
def benchmark(monkeypatch):
    """Runs a benchmark as a script, in this process."""
    threads, modules = torch.get_num_threads(), set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")

    yield run
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def test_every_benchmark_runs_and_the_page_is_written(benchmark, tmp_path, capsys):
    for name, arguments in TINY.items():
        benchmark(name, *arguments.split(), "--output", tmp_path / f"{name}.json")
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["settings"]["versions"]["torch"] == torch.__version__
        assert record["settings"]["machine"].endswith("1 thread")
        rows = record["rows"]
        assert {row["peer"] for row in rows} == PEERS[name]
        for row in rows:
            if "why" in row:
                assert "pip install" in row["why"] or "GPU" in row["why"]
            else:
                assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert "1 thread:\n\n| " in capsys.readouterr().out
    profile = json.loads((tmp_path / "step.json").read_text())["profile"]
    shares = [row["share"] for row in profile if row["dtype"] == "bfloat16"]
    assert len(shares) == 7 and min(shares) > 0
    assert sum(shares) == pytest.approx(1.0, abs=0.1)  # the median of each

    (page := tmp_path / "page.md").write_text((ROOT / "docs" / "performance.md").read_text("utf-8"))
    picture = tmp_path / "picture.png"
    benchmark("page", "--results", tmp_path, "--page", page, "--picture", picture)
    text = page.read_text("utf-8")
    assert "tiny, all decoder layers" in text and "| 32x48 | float32 | one |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = text
    benchmark("page", "--results", tmp_path, "--page", page, "--picture", picture)
    assert page.read_text("utf-8") == before


def test_types_that_a_run_does_not_measure_stay_with_the_machine_of_their_own(
    benchmark, tmp_path, capsys
):
    output = tmp_path / "step.json"
    arguments = ["--model", "tiny", "--rows", "1", "--length", "8", "--repeats", "1"]

    def run(dtypes, *more):
        benchmark("step", *arguments, *more, "--dtypes", dtypes, "--output", output)
        return json.loads(output.read_text()), capsys.readouterr().out

    record, _ = run("bfloat16")
    record["settings"]["machine"] = "a processor from before"
    output.write_text(json.dumps(record))
    for _ in range(2):  # also when the file holds rows of two runs
        both, printed = run("float32")
        assert {row["dtype"] for row in both["rows"]} == {"float32", "bfloat16"}
        assert [r for r in both["rows"] if r["dtype"] == "bfloat16"] == record["rows"]
        assert both["earlier"] == {"bfloat16": record["settings"]}
        assert "bfloat16: of an earlier run, on a processor from before." in printed
        assert len(both["profile"]) == 2 * len(record["profile"])
    again, printed = run("bfloat16,float32")
    assert "earlier" not in again and "earlier" not in printed
    other, _ = run("float32", "--length", "6")  # another question
    assert {row["dtype"] for row in other["rows"]} == {"float32"}
    output.write_text("{")
    assert len(run("float32")[0]["rows"]) == 4


def test_memory_use_is_what_the_allocator_reports(benchmark):
    import measure
    from torch import nn

    layers = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    x = torch.randn(128, 64)

    def step():
        layers(x).square().mean().backward()
        layers.zero_grad()

    step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    with measure.MemoryUse(torch.device("cpu")) as use:
        step()
    assert use.peak == pytest.approx(peak, rel=0.01)
    assert use.left == 0


def test_a_layer_keeps_what_its_backward_needs(benchmark):
    import measure
    from torch import nn

    x, linear = torch.randn(10, 6, requires_grad=True), nn.Linear(6, 4)
    cpu = torch.device("cpu")
    assert measure.kept_bytes(lambda: linear(x), cpu) == 0
    # The sigmoid's backward needs its output, which is not counted; the square's needs its input.
    assert measure.kept_bytes(lambda: x.sigmoid().square(), cpu) == 10 * 6 * 4


def test_memory_that_no_operator_made_counts_too(benchmark):
    import measure

    older = torch.ones(3)
    with measure.MemoryUse(torch.device("cpu")) as use:
        laid_over = torch.frombuffer(bytearray(400), dtype=torch.float32)
        sum_ = laid_over.view(10, 10).add(1).sum() + older.view(3)
    assert use.left == 400 + 3 * 4 and sum_.shape == (3,)
    assert use.peak == 400 + 400 + 4
