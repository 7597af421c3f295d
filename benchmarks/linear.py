"""Forward and backward of one analog layer: ours, aihwkit-lightning's, aihwkit's, torchao's.

The peers run interleaved in one process, on one thread. Figures are medians of paired ratios of CPU
time with their interquartile range, and the bytes that a layer keeps for its backward beside its
parameters, input and output.

    python benchmarks/linear.py [--shapes 576x576,2048x8192] [--tokens 512] [--repeats 9]

All analog layers have 8-bit inputs with a learned range, 8-bit outputs and 3 % weight noise, with
one tile a layer and with tiles of at most 512 rows; ours also with its noise drawn again in the
backward instead of kept. The floor is `nn.Linear` and one normal number drawn for each weight; on a
CPU in portions that its cache holds. There the floor of torch's operators is that and, once each,
the passes over weights, inputs and outputs that no layer made of them goes without. torchao's is
int8 quantization-aware training, without tiles, noise or ADC.

On a GPU figures are of wall time over several calls in a row; *alone* is the GPU's work without
waiting for Python, as a CUDA graph, where a peer can be one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import measure
import peers
import torch
from torch import Tensor, nn

#: (input) x (output) features: SmolLM2-135M and Llama-3.2-1B.
CPU_SHAPES = "576x576,576x1536,2048x2048,2048x8192"
#: Llama-3.2-1B and Phi-3-mini, whose projections are fused.
GPU_SHAPES = "2048x2048,2048x8192,8192x2048,3072x3072,3072x9216,3072x16384,8192x3072"
ANALOG = (peers.OURS, peers.REDRAWN, peers.LIGHTNING, peers.AIHWKIT)
#: A digital layer, and one normal number drawn for each of its weights: no layer with exact fresh
#: noise from torch's generator takes less.
FLOOR = "nn.Linear and the draw"
#: That, and what :func:`passes` does.
PASSES = "nn.Linear, the draw and the passes"
#: Numbers drawn at a time on a CPU.
PORTION = 2**18


class Draw:
    """One normal number for each weight [out, in], in portions that the cache holds."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        rows = max(PORTION // weight.shape[1], 1)
        self.portions = [slice(i, i + rows) for i in range(0, len(weight), rows)]
        self.drawn = torch.empty(rows, weight.shape[1])
        self.noisy = torch.empty_like(weight)

    def __call__(self) -> None:
        for portion in self.portions:
            self.drawn[: len(self.weight[portion])].normal_()

    def added(self, gain: Tensor) -> None:
        """Also times ``gain`` [out] and added to the weights."""
        for portion in self.portions:
            weight = self.weight[portion]
            noise, scale = self.drawn[: len(weight)].normal_(), gain[portion, None]
            if weight.dtype == noise.dtype:
                torch.addcmul(weight, noise, scale, out=self.noisy[portion])
            else:
                self.noisy[portion] = noise.mul_(scale).add_(weight)


def passes(x: Tensor, weight: Tensor, out: Tensor, draw: Draw) -> None:
    """Column maxima, noisy weights, DAC, ADC, and inputs for the backward, with an operator each.

    Not the search for what was clipped, nor anything of a tile's or a column's size. ``out``
    [T, out] is overwritten where it is of float32.
    """
    scale, levels = torch.tensor([[0.03]]), 127
    gain = torch.full(out.shape[1:], 0.5)
    torch.maximum(weight.amax(1), -weight.amin(1))
    draw.added(gain)
    code = x.float().div(scale).round_().clamp_(-levels, levels)
    codes, _ = code.to(torch.int8), code.to(x.dtype)
    made = out.float().mul_(gain).round_()
    torch.maximum(made.amax(), -made.amin())
    made.mul_(gain).to(out.dtype)
    torch.mul(codes, scale, out=torch.empty_like(x))


def compare(
    shape: str, dtype: str, tile_rows: int | None, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a peer."""
    device, type_ = arguments.device, measure.DTYPES[dtype]
    inputs, outputs = map(int, shape.split("x"))
    chosen = [peers.PLAIN, *ANALOG]
    if dtype != "float32":
        chosen.remove(peers.AIHWKIT)  # computes in fp32 only
    if tile_rows is None:
        chosen.append(peers.TORCHAO)
    gpu = device.type == "cuda"
    if gpu:
        chosen.append(peers.LIGHTNING_TRITON)
    away = peers.absent(chosen)
    layers = {}
    for name in chosen:
        if name not in away:
            linear = nn.Linear(inputs, outputs, bias=False, device=device, dtype=type_)
            # Normal, as trained weights are and the usual initialisation is not: the ADC's range
            # follows the largest weight.
            nn.init.normal_(linear.weight, std=inputs**-0.5)
            layers[name] = peers.layer(name, linear, tile_rows)
    x = torch.randn(arguments.tokens, inputs, device=device, dtype=type_, requires_grad=True)
    grad = torch.randn(arguments.tokens, outputs, device=device, dtype=type_)

    def step(name: str) -> Tensor:
        layers[name].zero_grad(set_to_none=gpu)
        # Some write into the gradient that they are given; beside a GPU's products, a copy counts.
        copied = not gpu or name in (peers.LIGHTNING, peers.LIGHTNING_TRITON)
        made = layers[name](x)
        made.backward(grad.clone() if copied else grad)
        if gpu:
            x.grad = None
        return made.detach()

    weight = layers[peers.PLAIN].weight.detach()
    draw = torch.empty_like(weight).normal_ if gpu else Draw(weight)

    def floor() -> Tensor:
        made = step(peers.PLAIN)
        draw()
        return made

    def floor_with_passes() -> None:
        passes(x.detach(), weight, step(peers.PLAIN), draw)

    if peers.LIGHTNING_TRITON in layers:
        try:
            step(peers.LIGHTNING_TRITON)
        except Exception as error:  # any of the compiler's
            away[peers.LIGHTNING_TRITON] = f"fails: {str(error).strip().splitlines()[-1]}"
            del layers[peers.LIGHTNING_TRITON]
    # Large layers vary less from round to round.
    repeats = max(3, arguments.repeats // 2) if inputs * outputs > 2**23 else arguments.repeats
    actions = {name: lambda name=name: step(name) for name in layers}
    floors = {FLOOR: floor} if gpu else {FLOOR: floor, PASSES: floor_with_passes}
    actions |= floors
    times = measure.interleave(actions, repeats, device)
    alone: dict[str, list[float]] = {}
    if gpu:
        graphs = {name: measure.graphed(action) for name, action in actions.items()}
        found = {name: graph for name, graph in graphs.items() if graph is not None}
        alone = measure.interleave(found, repeats, device)
    many = torch.randn(arguments.kept_tokens, inputs, device=device, dtype=type_)
    many.requires_grad_()
    key = {"shape": shape, "dtype": dtype, "tile_rows": tile_rows}
    rows: list[dict[str, Any]] = [key | {"peer": name, "why": why} for name, why in away.items()]
    for name in floors:
        to_linear = measure.ratio(times[name], times[peers.PLAIN])
        rows.append(key | {"peer": name, "seconds": times[name], "to_linear": to_linear})
    for name, seconds in alone.items():
        to_linear = measure.ratio(seconds, alone[peers.PLAIN])
        rows.append(key | {"peer": _alone(name), "seconds": seconds, "to_linear": to_linear})
    for name, layer in layers.items():
        kept = [measure.kept_bytes(lambda layer=layer, x=x: layer(x), device) for x in (x, many)]
        rows.append(
            key
            | {
                "peer": name,
                "seconds": times[name],
                "to_linear": measure.ratio(times[name], times[peers.PLAIN]),
                "ours_to_it": measure.ratio(times[peers.OURS], times[name]),
                "kept_bytes": kept[0],
                "kept_bytes_of_many": kept[1],
            }
        )
    return rows


def _alone(peer: str) -> str:
    """The name of what a GPU computes for a peer, without waiting for Python."""
    return f"{peer}, alone"


def cases(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of a shape, type and tiling by their peers."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["shape"], row["dtype"], row["tile_rows"]
        found.setdefault(key, {})[row["peer"]] = row
    return found


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Markdown of what :func:`measure.record` gave: ``"linear"`` and ``"kept"``."""
    rows, settings = record["rows"], record["settings"]
    tokens, many = (settings["arguments"][name] for name in ("tokens", "kept_tokens"))
    away = {row["peer"]: row["why"] for row in rows if "why" in row}
    notes = "".join(f"\n\n{peer}: {why}." for peer, why in away.items())
    kept = [_kept_table(rows, "kept_bytes", tokens)]
    if many != tokens:
        kept.append(_kept_table(rows, "kept_bytes_of_many", many))
    return {
        "linear": f"{tokens} tokens, {settings['machine']}:\n\n{_time_table(rows)}{notes}"
        f"{measure.earlier(record)}",
        "kept": "\n\n".join(kept),
    }


def _time_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = {FLOOR: "floor", PASSES: "floor of torch's operators"}
    heads |= {peers.OURS: "ours", peers.REDRAWN: "ours, noise drawn again"}
    heads |= {name: name for name in (peers.LIGHTNING, peers.AIHWKIT, peers.TORCHAO)}
    heads |= {peers.LIGHTNING_TRITON: peers.LIGHTNING_TRITON}
    heads |= {_alone(name): _alone(heads[name]) for name in (FLOOR, peers.OURS, peers.LIGHTNING)}
    there = {row["peer"] for row in rows}
    measured = [name for name in heads if name in there]
    lines = []
    for (shape, dtype, tile_rows), by_peer in cases(rows).items():
        cells = [_cell(by_peer, name, "to_linear") for name in measured]
        cells.append(_cell(by_peer, peers.LIGHTNING, "ours_to_it"))
        lines.append([shape, dtype, _tiles(tile_rows), *cells])
    titles = [*(heads[name] for name in measured), "ours / aihwkit-lightning"]
    return measure.markdown(["shape", "type", "tiles", *titles], lines)


def _kept_table(rows: Sequence[Mapping[str, Any]], which: str, tokens: int) -> str:
    lines = []
    for (shape, dtype, tile_rows), by_peer in cases(rows).items():
        sizes = [measure.megabytes(by_peer.get(name, {}).get(which)) for name in ANALOG]
        lines.append([shape, dtype, _tiles(tile_rows), *sizes])
    heads = ["ours", "ours, noise drawn again", *ANALOG[2:]]
    table = measure.markdown(["shape", "type", "tiles", *heads], lines)
    return f"{tokens} tokens:\n\n{table}"


def _cell(by_peer: Mapping[str, Any], peer: str, figure: str) -> str:
    row = by_peer.get(peer, {})
    return row["why"].partition(":")[0] if "why" in row else measure.shown(row.get(figure))


def _tiles(tile_rows: int | None) -> str:
    return "one" if tile_rows is None else f"{tile_rows} rows"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--shapes", help="inputs x outputs: 576x576,2048x8192")
    parser.add_argument("--tokens", type=int, help="rows of the input (512; on a GPU 4096)")
    parser.add_argument("--kept-tokens", type=int, help="also for kept bytes (2048; GPU 4096)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; half for large layers")
    arguments = parser.parse_args()
    dtypes = measure.begin(arguments)
    gpu = arguments.device.type == "cuda"
    arguments.shapes = arguments.shapes or (GPU_SHAPES if gpu else CPU_SHAPES)
    arguments.tokens = arguments.tokens or (4096 if gpu else 512)
    arguments.kept_tokens = arguments.kept_tokens or (4096 if gpu else 2048)
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes.split(","):
        for dtype in dtypes:
            for tile_rows in (None, 512):
                rows += compare(shape, dtype, tile_rows, arguments)
    made = measure.record(arguments, rows)
    measure.finish(arguments, made, tables(made).values())


if __name__ == "__main__":
    main()
