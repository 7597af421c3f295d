"""The page of a sweep: complete, self-contained, harmless, and readable in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from analog_plugin.evaluation.layer_plots import sensitivity_maps
from analog_plugin.evaluation.noise import NoiseCell, NoiseReport
from analog_plugin.evaluation.plots import duration, figures
from analog_plugin.evaluation.report import write_report
from analog_plugin.evaluation.sensitivity import Sensitivity, SensitivityReport
from analog_plugin.noise.specification import split_label

NOISES = ["pcm", "gaussian:0.01", "gaussian:0.02", "hermes@1h", "hermes@1d", "hermes@1y"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def reports(names=("original", "trained"), noises=NOISES, seeds=3):
    made = {}
    for factor, name in enumerate(names, 1):
        cells = [NoiseCell("none", None, {"kl": 0.1 * factor, "perplexity": 17.0})]
        cells += [
            NoiseCell(noise, seed, {"kl": factor * (1 + i + 0.1 * seed), "perplexity": 20.0 + seed})
            for i, noise in enumerate(noises)
            for seed in range(seeds)
        ]
        made[name] = NoiseReport(cells)
    return made


class Tags(HTMLParser):
    """Checks that what is opened is closed, and collects tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_that_was_measured_is_shown(tmp_path):
    text = write_report(reports(), tmp_path, title="A title", notes=["A note."])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for noise in NOISES:
        assert f"<td>original</td><td>{noise}</td>" in page and f"| trained | {noise} |" in text
    assert "A title" in page and "A note." in page and "A note." in text
    assert "trained − original" in page and "trained − original" in text
    assert page.count("<svg") == len(list(tmp_path.glob("*.png"))) == 2 * 3
    assert {path.name for path in tmp_path.glob("*.png")} >= {
        "seeds-kl.png", "level-gaussian-kl.png", "time-hermes-1-perplexity.png",
    }  # fmt: skip


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    write_report(reports(), tmp_path, title="x")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for tag, attributes in Tags(page).seen:
        assert tag not in ("script", "link", "iframe", "object", "img")
        for name, value in attributes.items():
            if name.rpartition(":")[2] in ("href", "src"):
                assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", page)


def test_names_are_text_and_never_markup(tmp_path):
    evil = '<script>alert(1)</script>"&/../x'
    write_report(
        reports(names=[evil, "other"], noises=["pcm", "gaussian:1", f"{evil}:1", f"{evil}:2"]),
        tmp_path / ".", title=evil, notes=[evil],
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert all(tag != "script" for tag, _ in Tags(page).seen)
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path}


def test_names_may_hold_what_figures_would_take_for_more(tmp_path):
    names = ["a$x_{$b", "_hidden", "a|b"]
    text = write_report(reports(names=names), tmp_path, title="$\\frac{$")
    assert "a\\|b" in text and all(line.count(" | ") < 6 for line in text.splitlines())
    (figure,) = [f for n, f in figures(reports(names=names)).items() if n == "level-gaussian-kl"]
    (axis,) = figure.axes
    assert [entry.get_text() for entry in axis.get_legend().get_texts()] == names


def test_a_metric_that_one_model_lacks_leaves_a_gap(tmp_path):
    both = reports()
    for cell in both["trained"].cells:
        del cell.metrics["kl"]
    text = write_report(both, tmp_path, title="x")
    assert "| trained | pcm | – |" in text


def test_the_same_reports_make_the_same_page(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(reports(), tmp_path / name, title="x")
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_and_one_model_are_enough(seeds, tmp_path):
    text = write_report(reports(["one"], ["pcm"], seeds), tmp_path, title="x")
    assert "Paired" not in text and "| one | pcm |" in text
    assert ("±" in text.splitlines()[3]) == (seeds > 1)


def test_curves_need_two_levels_or_times():
    assert all(name.startswith("seeds-") for name in figures(reports(noises=["pcm", "hermes@1d"])))
    names = figures(reports(noises=["pcm", "pcm:2", "gaussian:1", "gaussian:2@1h"]))
    assert [name for name in names if name.startswith("level")] == [
        "level-pcm-kl",
        "level-pcm-perplexity",
    ]


def test_labels_are_read_for_the_axes():
    assert split_label("pcm").level == 1.0 and split_label("gaussian").level == 0.03
    assert split_label("hermes:1.5@1h") == ("hermes", 1.5, 3600.0)
    assert split_label("of_others@now") == ("of_others", None, None)
    assert split_label("none") == ("none", None, None)
    assert [duration(t) for t in (1, 90, 3600, 86400.0, 31536000, 1.5)] == [
        "1s", "90s", "1h", "1d", "1y", "1.5s",
    ]  # fmt: skip


def test_a_map_of_layers_is_drawn(tmp_path):
    rows = [
        Sensitivity(f"model.layers.{block}.{kind}", "all", 0.01 * (block + 1), 0.1)
        for block in range(3)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ]
    report = SensitivityReport([*rows, Sensitivity("lm_head", "all", 0.0, 0.2)])
    write_report(reports(), tmp_path, title="x", sensitivity={"a & b": report})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<figcaption>a &amp; b</figcaption>" in page and "Layer by layer" in page
    (axis, _) = sensitivity_maps({"a": report})["a"].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["–", "0", "1", "2"]
    kinds = [label.get_text() for label in axis.get_xticklabels()]
    assert kinds == ["lm_head", "down_proj", "q_proj"]
    shown = axis.images[0].get_array()
    assert shown[2][kinds.index("q_proj")] == pytest.approx(0.02)
    assert SensitivityReport.from_dict(report.to_dict()) == report


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_complaint(width, tmp_path):
    write_report(reports(), tmp_path, title="A title")
    picture = tmp_path / "page.png"
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={picture}", (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0 and picture.stat().st_size > 10_000
    assert "CONSOLE" not in result.stderr
