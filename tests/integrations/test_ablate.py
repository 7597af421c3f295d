"""``optimum-cli analog ablate``: runs from one start, kept as they end."""

import json

import pytest

from analog_integrations.optimum import main_ablate
from analog_plugin import AnalogError
from analog_plugin.training import ablation
from analog_plugin.training.ablation import UNTRAINED, WHOLE

RECIPE = {
    "scheme": {"preset": "AFM_PLUS", "tile_rows": 32, "range_init_batches": 2, "digital_share": 0},
    "data": {"tokens": 512, "sequence_length": 16},
    "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    "evaluation": {"seeds": 2, "blocks": 2, "length": 16},
}
ROWS = [
    WHOLE, UNTRAINED, "without training noise", "with clipping at 2.5 σ", "trained without the ADC",
    "ranges as calibrated", "cross-entropy instead of distillation",
    "text of corpus.txt instead of own tokens",
]  # fmt: skip


def recipe(corpus, **changes):
    evaluation = RECIPE["evaluation"] | {"corpus": str(corpus)}
    return RECIPE | {"evaluation": evaluation} | changes


def test_every_ingredient_has_a_run_and_finished_ones_are_kept(
    model_directory, corpus, tmp_path, monkeypatch
):
    text = tmp_path / "corpus.txt"
    text.write_text(corpus.read_text())
    trained = []
    real = ablation.run_training

    def stop_at_the_fourth(*arguments):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(ablation, "run_training", stop_at_the_fourth)
    options = {"recipe": recipe(corpus), "corpus": str(text)}
    with pytest.raises(KeyboardInterrupt):
        main_ablate(str(model_directory), tmp_path / "out", **options)
    kept = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").open()][1:]
    assert [record["run"] for record in kept] == ROWS[:4]

    again = []
    monkeypatch.setattr(ablation, "run_training", lambda *a: (again.append(a[0]), real(*a)))
    reports = main_ablate(str(model_directory), tmp_path / "out", **options)
    assert list(reports) == ROWS and len(again) == 4
    unbroken = main_ablate(str(model_directory), tmp_path / "other", **options)
    assert unbroken == reports
    kls = [report.mean("none", "kl") for report in reports.values()]
    assert len(set(kls)) == len(kls)  # every change changed something
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"{UNTRAINED} − {WHOLE}" in table and (tmp_path / "out" / "report.html").exists()
    with pytest.raises(AnalogError, match="other settings"):
        main_ablate(str(model_directory), tmp_path / "out", recipe(corpus), steps=3)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"ingredients": ["dac"]}, "no ingredient 'dac'"),
        ({}, {"ingredients": ["tokens"]}, "no corpus was given"),
        ({"scheme": {"output_bits": None}}, {"ingredients": ["adc"]}, "no ADC"),
        ({"training": None}, {}, "needs both sections"),
        ({"evaluation": None}, {}, "needs both sections"),
        ({}, {"steps": 0}, "steps is 0"),
    ],
)
def test_what_cannot_be_varied_is_one_sentence(
    changes, options, message, model_directory, corpus, tmp_path
):
    with pytest.raises(AnalogError, match=message):
        main_ablate(str(model_directory), tmp_path / "out", recipe(corpus, **changes), **options)
