"""Forward and backward of ``AnalogLinear`` against ``nn.Linear`` and aihwkit-lightning.

The peers run interleaved in one process, on one thread; the figures are medians of CPU time, as
ratios, with the interquartile range, and the bytes that each layer keeps for its backward.

    python benchmarks/linear.py [--shapes 576x576,2048x8192] [--tokens 512] [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from analog_plugin import AnalogScheme
from analog_plugin.layers import AnalogLinear

RANGE = 4.0


def analog(linear: nn.Linear, tile_rows: int | None) -> nn.Module:
    layer = AnalogLinear.from_linear(linear, AnalogScheme(tile_rows=tile_rows))
    layer.set_input_range(RANGE)
    return layer.train()


def lightning(linear: nn.Linear, tile_rows: int | None) -> nn.Module:
    from aihwkit_lightning.nn import AnalogLinear as LightningLinear
    from aihwkit_lightning.simulator.configs import (
        TorchInferenceRPUConfig,
        WeightClipType,
        WeightNoiseInjectionType,
    )

    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound, config.forward.out_noise = 14.0, 0.0
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
    config.modifier.std_dev = 0.03
    ranges = config.pre_post.input_range
    ranges.enable, ranges.learn_input_range, ranges.init_from_data = True, True, 0
    config.mapping.max_input_size = tile_rows or -1
    layer = LightningLinear.from_digital(linear, config)
    layer.input_range.data.fill_(RANGE)
    return layer.train()


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    layer(x).backward(grad)


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Storage held for backward beyond parameters and input, each storage counted once."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    own.add(x.untyped_storage().data_ptr())

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    # What a custom function keeps on its context rather than through the hooks.
    for node in _nodes(y.grad_fn):
        for value in vars(node).values() if hasattr(node, "__dict__") else ():
            for tensor in _tensors(value):
                if tensor.untyped_storage().data_ptr() not in own:
                    held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def _nodes(root) -> list:
    seen, queue = [], [root]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.append(node)
            queue += [following for following, _ in node.next_functions]
    return seen


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def compare(
    layers: dict[str, nn.Module], x: Tensor, grad: Tensor, repeats: int
) -> dict[str, list[float]]:
    """CPU seconds of each repetition, peers interleaved."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(repeats + 2):
        for name, layer in layers.items():
            layer.zero_grad(set_to_none=False)
            start = time.process_time()
            step(layer, x, grad)
            if repeat >= 2:  # the first two warm up
                times[name].append(time.process_time() - start)
    return times


def ratio(a: list[float], b: list[float]) -> tuple[float, float]:
    """Median of paired ratios, and their interquartile range."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    quartiles = statistics.quantiles(pairs, n=4)
    return statistics.median(pairs), quartiles[2] - quartiles[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="576x576,576x1536,2048x2048,2048x8192")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    makers: dict[str, Callable[[nn.Linear, int | None], nn.Module]] = {
        "analog-plugin": analog,
        "aihwkit-lightning": lightning,
    }
    rows = []
    print(f"forward + backward, {arguments.tokens} tokens, one thread, median (IQR)")
    print(
        "| shape | type | tiles | ours / nn.Linear | ours / lightning | lightning / nn.Linear "
        "| kept, ours | kept, lightning |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        inputs, outputs = map(int, shape.split("x"))
        for dtype in (torch.float32, torch.bfloat16):
            for tile_rows in (None, 512):
                linear = nn.Linear(inputs, outputs, bias=False).to(dtype)
                layers: dict[str, nn.Module] = {"nn.Linear": linear}
                for name, make in makers.items():
                    own = nn.Linear(inputs, outputs, bias=False).to(dtype)
                    layers[name] = make(own, tile_rows)
                x = torch.randn(arguments.tokens, inputs, dtype=dtype, requires_grad=True)
                grad = torch.randn(arguments.tokens, outputs, dtype=dtype)
                times = compare(layers, x, grad, arguments.repeats)
                kept = {name: kept_bytes(layer, x) for name, layer in layers.items()}
                ours, peer, plain = (
                    times[n] for n in ("analog-plugin", "aihwkit-lightning", "nn.Linear")
                )
                figures = [ratio(ours, plain), ratio(ours, peer), ratio(peer, plain)]
                cells = [f"{m:.2f} ({s:.2f})" for m, s in figures]
                memory = [f"{kept[n] / 1e6:.1f} MB" for n in makers]
                print(
                    f"| {shape} | {str(dtype)[6:]} | {tile_rows or 'one'} | "
                    + " | ".join(cells + memory)
                    + " |",
                    flush=True,
                )
                rows.append(
                    {
                        "shape": shape,
                        "dtype": str(dtype)[6:],
                        "tile_rows": tile_rows,
                        "ratios": dict(
                            zip(("linear", "lightning", "lightning_linear"), figures, strict=True)
                        ),
                        "kept_bytes": kept,
                    }
                )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
