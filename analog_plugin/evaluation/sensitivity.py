"""What each layer costs on analog hardware, and which ones to keep digital under a budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.evaluation.blocks import KnownBlocks
from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.evaluation.noise import programmed
from analog_plugin.layers import analog_layers, digital_layers, forward_state
from analog_plugin.modes import evaluation_mode
from analog_plugin.noise import resolve_noise
from analog_plugin.progress import progress_bar
from analog_plugin.scheme import fused_with

#: What of the hardware acts on the layers in question.
PARTS = ("inputs", "outputs", "noise", "all")
_GROUPS: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    "layer": lambda name, layers: name,
    "fused": lambda name, layers: fused_with(name, layers)[0],
    "kind": lambda name, layers: name.rpartition(".")[2],
}


@dataclass(frozen=True)
class Sensitivity:
    """KL to the original when some layers alone are analog.

    Args:
        name: The layer, or the kind of layer (last part of the name).
        part: ``"inputs"`` (DAC alone), ``"outputs"`` (ADC alone), ``"noise"`` (programming noise
            alone) or ``"all"``.
        kl: Nats per token.
        share: Of the analog multiply-accumulates (0 to 1) that these layers do.
    """

    name: str
    part: str
    kl: float
    share: float


@dataclass
class SensitivityReport:
    """Rows of :func:`analyze_sensitivity`, most costly first within each part."""

    rows: list[Sensitivity] = field(default_factory=list)

    def kl(self, name: str, part: str = "all") -> float:
        """The KL of one row."""
        return next(row.kl for row in self.rows if (row.name, row.part) == (name, part))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_dict` reads them back."""
        return {"rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SensitivityReport:
        """A report from what :meth:`to_dict` gave."""
        return cls([Sensitivity(**row) for row in values["rows"]])


def analyze_sensitivity(
    model: nn.Module,
    tokens: Tensor,
    *,
    by: str = "layer",
    parts: Sequence[str] = ("all",),
    noise: Any = "pcm",
    seed: int = 0,
    batch_size: int = 8,
) -> SensitivityReport:
    """Measure the KL to the digital model when one layer, or one kind of layer, alone is analog.

    Args:
        model: A model with analog layers and calibrated ranges; it is not changed.
        tokens: [N, S] token ids.
        by: ``"layer"``; ``"fused"``: members of a group that serving engines fuse (q/k/v, gate/up)
            together, under the first one's name; or ``"kind"``: all layers with the same last part
            of their names.
        parts: Which of the hardware's effects act; see :class:`Sensitivity`.
        noise: Programming noise of the parts ``"noise"`` and ``"all"``; None: converters only.
        seed: Seed of the programming.
        batch_size: Rows evaluated together.

    Raises:
        AnalogError: The model is not analog, or ``by`` or a part is unknown.
    """
    forward_state(model)
    if by not in _GROUPS:
        raise AnalogError(f"by is {by!r}, but must be layer, fused or kind.")
    for part in parts:
        if part not in PARTS:
            raise AnalogError(f"There is no part {part!r}; write one of {', '.join(PARTS)}.")
    programming = resolve_noise(noise)
    groups: dict[str, list[Any]] = {}
    layers = dict(analog_layers(model))
    for name, layer in layers.items():
        groups.setdefault(_GROUPS[by](name, layers), []).append(layer)
    total = sum(layer.weight.numel() for layer in layers.values())
    rows = []
    fits = by != "kind" and len(tokens) <= batch_size
    with evaluation_mode(model), digital_layers(model), programmed(model, None, None):
        reference = Reference.of(model, tokens, batch_size, keep_logits=True)
        known = _known_blocks(model, tokens, reference) if fits else None
        cells = [(name, part) for part in parts for name in groups]
        for name, part in progress_bar(cells, desc="Measuring sensitivity"):
            spared = known.before(name) if known is not None else contextlib.nullcontext()
            with _alone(groups[name], part, programming, seed), spared:
                kl = fidelity(model, tokens, reference, batch_size)["kl"]
            share = sum(layer.weight.numel() for layer in groups[name]) / total
            rows.append(Sensitivity(name, part, kl, share))
    return SensitivityReport(sorted(rows, key=lambda r: (parts.index(r.part), -r.kl)))


def choose_digital(report: SensitivityReport, budget: float) -> list[str]:
    """The layers to keep digital: greatest KL per multiply-accumulate first, within ``budget``.

    Args:
        report: By layer, with the part ``"all"``.
        budget: Share of the multiply-accumulates that may stay digital, 0 to 1.
    """
    chosen, spent = [], 0.0
    rows = [row for row in report.rows if row.part == "all"]
    for row in sorted(rows, key=lambda r: -r.kl / r.share):
        if spent + row.share <= budget:
            chosen.append(row.name)
            spent += row.share
    return chosen


def _known_blocks(model: nn.Module, tokens: Tensor, reference: Reference) -> KnownBlocks:
    states, batch = reference.states.alike(model), tokens.to(next(model.parameters()).device)
    with torch.no_grad():
        return KnownBlocks(model, lambda: states(input_ids=batch))


@contextlib.contextmanager
def _alone(layers: Sequence[Any], part: str, noise: Any | None, seed: int) -> Iterator[None]:
    """Within this context one effect of the hardware acts on ``layers``, which were digital."""
    schemes = [layer.scheme for layer in layers]
    try:
        for layer in layers:
            if part in ("noise", "all") and noise is not None:
                layer.program(noise, seed)
            without_adc = part == "outputs" and layer.scheme.output_bits is None
            layer.digital = part == "noise" or without_adc
            if part == "inputs":
                layer.scheme = layer.scheme.replace(output_bits=None)
            elif part == "outputs" and not without_adc:
                # The ADC's bound is scaled by the range, so a DAC stays, too fine to matter.
                layer.scheme = layer.scheme.replace(input_bits=16)
        yield
    finally:
        for layer, scheme in zip(layers, schemes, strict=True):
            layer.scheme, layer.digital = scheme, True
            layer.restore()
