"""An inspection as text."""

from __future__ import annotations

from collections.abc import Iterator

from analog_plugin.checkpoint.digital import DIGITAL_PROFILES
from analog_plugin.errors import shown
from analog_plugin.inspection.analog_part import AnalogPart, Spread
from analog_plugin.inspection.records import Converter, Inspection

_WIDTH = 15
_MOST = 20
_ANSWERS = {True: "yes", False: "no", None: "not known"}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def overview(inspection: Inspection) -> str:
    """All of it, a line a subject."""
    lines = [f"{inspection.directory}: {_kind(inspection)}"]
    if inspection.architecture is not None:
        dtypes = ", ".join(_DTYPES.get(name, name) for name in inspection.dtypes) or "no weights"
        parts = inspection.architecture, dtypes, f"{inspection.parameters:,} parameters"
        lines.append(_row("model", ", ".join(parts)))
    lines += [_row(title, text) for title, text in _quantized(inspection)]
    if inspection.analog is not None:
        lines += [_row(title, text) for title, text in _analog(inspection.analog)]
    lines += [_row(title, text) for title, text in _sizes(inspection)]
    for loader in inspection.loaders:
        reason = f": {loader.reason}" if loader.reason else ""
        lines.append(_row(loader.name, f"{_ANSWERS[loader.takes]}{reason}", 24))
    lines += [_row("note", note) for note in inspection.notes]
    problems = inspection.problems
    lines.append(_row("problems", str(len(problems)) if problems else "none found"))
    lines += [f"  - {problem}" for problem in problems[:_MOST]]
    if len(problems) > _MOST:
        lines.append(f"  - and {len(problems) - _MOST} more, which --json lists")
    return "\n".join(lines)


def _row(title: str, text: str, width: int = _WIDTH) -> str:
    return f"  {title:<{width}}{text}"


def _kind(inspection: Inspection) -> str:
    profile = inspection.profile
    summary = {p.name: f"{p.name}, {p.summary}" for p in DIGITAL_PROFILES}.get(profile or "")
    if inspection.kind == "analog-fp":
        return f"{profile or 'analog-fp'}, the analog model and a plain checkpoint in one"
    if inspection.kind == "digital":
        return summary or "a digital profile that this package does not name"
    if inspection.kind == "quantized":
        like = f", laid out like {summary}" if summary else ""
        return f"quantized by another tool ({_printable(inspection.layout)}){like}"
    return {
        "plain": "a model in full precision, without quantization",
        "adapter": "an adapter for another model",
        "conductances": "conductances, of every tile for a chip's programming software",
    }.get(inspection.kind, "no model")


def _quantized(inspection: Inspection) -> Iterator[tuple[str, str]]:
    if not inspection.quantized:
        return
    ignored = inspection.ignored
    most = ", ".join(map(_printable, ignored[:4])) + (
        f" and {len(ignored) - 4} more" if len(ignored) > 4 else ""
    )
    weights = sum(group.weights for group in inspection.groups)
    left_out = f"; left out: {most}" if ignored else ""
    layers = f"{len(inspection.quantized)} layers with {weights:,} weights"
    yield "quantized", f"{layers}{left_out}"
    groups = ", ".join(
        f"{'full precision' if group.bits is None else f'{group.bits} bits'} in {group.layers} "
        "layers"
        for group in inspection.groups
    )
    stored = inspection.sizes.bits_per_weight
    disk = "" if stored is None else f"; {stored:.2f} bits a weight on disk, scales included"
    mean = inspection.average_bits
    average = f"; {mean:.2f} bits on average" if mean and len(inspection.groups) > 1 else ""
    yield "weights", f"{_printable(inspection.layout)}: {groups}{average}{disk}"
    whose = "for plain loaders " if inspection.kind == "analog-fp" else ""
    yield "inputs", whose + _converter(inspection.inputs)
    yield "outputs", whose + _converter(inspection.outputs)


def _printable(text: object) -> str:
    """Text from a file, which a terminal would otherwise take for more than text."""
    plain = isinstance(text, str) and text.isprintable() and len(text) <= 100
    return str(text) if plain else shown(text)


def _converter(converter: Converter | None) -> str:
    if converter is None:
        return "not quantized"
    if not converter.static:
        return f"{converter.bits} bits, dynamic (every token by its own maximum)"
    ranges = f"; ranges {_spread(converter.ranges)}" if converter.ranges else ""
    return f"{converter.bits} bits, static{ranges}"


def _spread(spread: Spread) -> str:
    numbers = spread.smallest, spread.median, spread.largest
    return " / ".join(f"{number:.4g}" for number in numbers) + " (smallest / median / largest)"


def _analog(analog: AnalogPart) -> Iterator[tuple[str, str]]:
    scheme = analog.scheme
    yield "analog", f"{analog.layers} layers on {analog.tiles} tiles of up to {analog.rows} rows"
    inputs, outputs = (
        "not quantized" if bits is None else f"{bits} bits"
        for bits in (scheme["input_bits"], scheme["output_bits"])
    )
    yield "converters", f"inputs {inputs}, {scheme['input_range']}; outputs {outputs}"
    for kind, spread in analog.input_ranges.items():
        yield f"  {_printable(kind)}", f"ranges {_spread(spread)}"
    yield "digital prefix", f"{analog.prefix or 'no'} token{'s' if analog.prefix != 1 else ''}"
    clip = scheme["clip_sigma"]
    clipped = "no clipping" if clip is None else f"clipping at {clip:g} σ"
    yield "trained with", f"weight noise {scheme['weight_noise']:g}, {clipped}"
    if analog.steps is not None:
        tokens = "" if analog.tokens is None else f" on {analog.tokens:,} tokens"
        seed = "" if analog.seed is None else f", seed {analog.seed}"
        yield "training", f"{analog.steps} steps{tokens}{seed}"


def _sizes(inspection: Inspection) -> Iterator[tuple[str, str]]:
    sizes = inspection.sizes
    if not sizes.weight_files:
        return
    parts = {
        "quantized codes": sizes.codes,
        "layers in full precision": sizes.layers,
        "scales": sizes.scales,
        "embeddings and head": sizes.embeddings,
        "other": sizes.other,
    }
    held = ", ".join(f"{name} {_bytes(value)}" for name, value in parts.items() if value)
    yield "on disk", f"{_bytes(sizes.weight_files)} of weights: {held}"
    if sizes.analog_state:
        yield "analog state", _bytes(sizes.analog_state)


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
