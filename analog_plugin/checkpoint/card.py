"""The model card, and the table that it shares with the command's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from analog_plugin.checkpoint.digital import DigitalPlan
from analog_plugin.evaluation.tables import TITLES, Summary
from analog_plugin.layers import analog_layers, model_scheme
from analog_plugin.scheme import AnalogScheme


def result_table(result: Any) -> str:
    """The measurements as a Markdown table, one row a model and noise."""
    reports = result.reports
    if not reports:
        return "Nothing was measured (evaluation: null).\n"
    metrics = [m for m in TITLES if any(m in c.metrics for r in reports.values() for c in r.cells)]
    lines = [
        "| model | noise | " + " | ".join(TITLES[m] for m in metrics) + " |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for name, report in reports.items():
        for noise in dict.fromkeys(cell.noise for cell in report.cells):
            values = [str(Summary.of(report.values(noise, m))) for m in metrics]
            lines.append(f"| {name} | {noise} | " + " | ".join(values) + " |")
    lines += _paired_differences(reports, metrics)
    settings = result.recipe.evaluation
    record = result.training
    seconds = record.get("seconds", {})
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    trained = (
        f"Trained {record['steps']} steps on {record['tokens']:,} tokens, drawn from a set of "
        f"{record['dataset_tokens']:,}."
        if record.get("steps")
        else "Not trained."
    )
    lines += [
        "",
        f"Mean ± standard deviation over {settings.seeds} noise seeds. Evaluated on "
        f"{settings.blocks} blocks of {settings.length} tokens of `{settings.corpus}`. {trained} "
        f"Time: {spent}.",
        "",
        "*original, digital*: the unchanged model without converters; under noise, the noise "
        "alone. *off the shelf*: on the analog hardware with the published input ranges. "
        "*original*: prepared as the scheme says, before training. *analog-trained*: the same "
        "hardware, tiles, converters and seeds after training. *loaded plainly*: what loaders "
        "without analog-plugin make of this directory; no ADC, no noise.",
    ]
    return "\n".join(lines) + "\n"


def _paired_differences(reports: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """Rows of original minus trained, seed by seed: both had the same device errors."""
    if not {"original", "analog-trained"} <= reports.keys():
        return []
    before, after = reports["original"], reports["analog-trained"]
    lines = []
    for noise in dict.fromkeys(cell.noise for cell in after.cells if cell.seed is not None):
        values = []
        for metric in metrics:
            pairs = zip(before.values(noise, metric), after.values(noise, metric), strict=True)
            values.append(str(Summary.of([a - b for a, b in pairs])))
        lines.append(f"| *original − trained, per seed* | {noise} | " + " | ".join(values) + " |")
    return lines


def model_card(model: Any, profile: str, result: Any | None, plan: Any = None) -> str:
    """The text of the checkpoint's ``README.md``; ``plan`` is what the profile's exporter made."""
    layers = dict(analog_layers(model))
    scheme = model_scheme(model)
    base = getattr(model.config, "_name_or_path", "") or type(model).__name__
    weights = sum(layer.weight.numel() for layer in layers.values())
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [analog, compressed-tensors]",
        "---",
        "",
        f"# {base.rstrip('/').rsplit('/', 1)[-1]}, analog ({profile})",
        "",
        f"Made by analog-plugin for analog in-memory computing hardware: {len(layers)} linear "
        f"layers with {weights / 1e6:.1f} M weights.",
        "",
        f"- inputs: {_bits(scheme.input_bits)}, range {scheme.input_range}",
        f"- outputs: {_bits(scheme.output_bits)}, one bound for the whole model "
        f"({_number(scheme.out_bound)} × input range × column maximum)",
        f"- tiles: {scheme.tile_rows or 'whole layer'} rows",
        *_training(scheme, result),
        *_start(scheme),
        "",
    ]
    usage = _usage(profile) if (own := getattr(plan, "usage", None)) is None else own
    return "\n".join([*head, *usage, *_measured(result), *_limits(model, profile, plan)]) + "\n"


def _training(scheme: AnalogScheme, result: Any | None) -> list[str]:
    if result is None:  # how a loaded model was trained stands in its own directory
        return []
    if not result.training.get("steps"):
        return ["- not trained"]
    clip = "none" if scheme.clip_sigma is None else f"{scheme.clip_sigma:g} σ"
    return [
        f"- training noise: {scheme.weight_noise:g} of the column maximum; clipping: {clip} "
        f"({scheme.clip_schedule})"
    ]


def _start(scheme: AnalogScheme) -> list[str]:
    lines = []
    if scheme.prefix is not None:
        count = scheme.prefix if isinstance(scheme.prefix, int) else len(scheme.prefix)
        tokens = "token" if count == 1 else f"{count} tokens"
        lines.append(f"- digital prefix: keys and values of the first {tokens}, in full precision")
    if scheme.rescale is not None:
        lines.append(f"- rescaling of channels: {scheme.rescale}")
    digital = [pattern for pattern, change in scheme.overrides if change == "digital"]
    if digital:
        lines.append(f"- digital all the same: {', '.join(digital)}")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _bits(bits: int | None) -> str:
    return "not quantized" if bits is None else f"{bits} bit"


def _usage(profile: str) -> list[str]:
    lines = ["## Use", "", "```python", "from transformers import AutoModelForCausalLM", ""]
    lines += ['digital = AutoModelForCausalLM.from_pretrained("this-directory")', "```", ""]
    if profile == "analog-fp":
        lines += [
            "With analog-plugin installed, the simulated analog model under programming noise:",
            "",
            "```python",
            "from optimum.analog import AnalogModelForCausalLM",
            "",
            'model = AnalogModelForCausalLM.from_pretrained("this-directory", noise="pcm", seed=0)',
            "```",
            "",
        ]
    return lines


def _measured(result: Any | None) -> list[str]:
    return [] if result is None else ["## Measured", "", result_table(result)]


def _limits(model: nn.Module, profile: str, plan: Any) -> list[str]:
    layers = [layer for _, layer in analog_layers(model)]
    quantized = plan.layers if isinstance(plan, DigitalPlan) else {}
    kept = [name for name, _ in analog_layers(model) if name not in quantized]
    lines = ["## Limits", ""]
    if quantized and kept:
        lines.append(
            "- For plain loaders these layers are not quantized, since the first tokens' massive "
            "activations would take the range from all others, or since engines fuse them with "
            f"digital ones: {', '.join(kept)}."
        )
    if any(layer.input_scale is not None for layer in quantized.values()):
        if any(layer.plain_range is not None for layer in layers):
            lines.append(
                "- Plain loaders know no digital prefix: one input range a layer, the first "
                "tokens' massive activations in it, is written for them, which costs accuracy."
            )
        elif any(len(layer.tiles) > 1 for layer in layers):
            lines.append(
                "- Plain loaders know one input range a layer: the largest of its tiles is written "
                "for them, which costs accuracy against the analog model's range per tile."
            )
        levels = layers[0].scheme.input_levels
        lines.append(
            f"- Plain loaders quantize inputs to [-{levels + 1}, {levels}], the analog DAC to "
            f"±{levels}: a value clipped below the range differs by one code."
        )
    lines += [f"- {note}" for note in getattr(plan, "notes", ())]
    if profile == "analog-fp":
        lines.append("- The directory's digital reading has neither ADC nor noise.")
    return lines if len(lines) > 2 else []
