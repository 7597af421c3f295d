"""The distillation loss, forward and backward: whole logits, ours in chunks, Liger's fused kernel.

From hidden states to KL(teacher ‖ student) and its gradients, with the language-model heads of both
sides. The peers run interleaved in one process, on one thread. Figures are medians of paired ratios
of CPU time with their interquartile range, and the peak of tensor bytes beyond the inputs and the
gradients that are left.

    python benchmarks/loss.py [--tokens 2048] [--vocabulary 49152] [--hidden 576] [--repeats 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import measure
import peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analog_plugin.training.loss import distillation_loss

NAIVE = "whole logits"
Loss = Callable[[Tensor, Tensor, nn.Linear, nn.Linear], Tensor]


def naive(student: Tensor, teacher: Tensor, head: nn.Linear, teacher_head: nn.Linear) -> Tensor:
    with torch.no_grad():
        goal = log_probabilities(teacher_head(teacher))
    return kl(log_probabilities(head(student)), goal)


def log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of log-probabilities [T, V], as programs usually write it."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def ours(student: Tensor, teacher: Tensor, head: nn.Linear, teacher_head: nn.Linear) -> Tensor:
    return distillation_loss(student[None], teacher[None], head, teacher_head)


def liger(student: Tensor, teacher: Tensor, head: nn.Linear, teacher_head: nn.Linear) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.0)  # the KL to the teacher
    return fused(student, head.weight, teacher, teacher_head.weight, None)


LOSSES: dict[str, Loss] = {NAIVE: naive, peers.OURS: ours, peers.LIGER: liger}


def why_not(peer: str, device: torch.device) -> str | None:
    why = peers.why_not(peer)
    return "needs a GPU" if why is None and peer == peers.LIGER and device.type == "cpu" else why


def compare(dtype: str, trainable: bool, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a peer."""
    device, type_ = arguments.device, measure.DTYPES[dtype]
    vocabulary, width = arguments.vocabulary, arguments.hidden
    like = {"device": device, "dtype": type_}
    head, teacher_head = (nn.Linear(width, vocabulary, bias=False, **like) for _ in range(2))
    head.requires_grad_(trainable)
    teacher_head.requires_grad_(False)
    student = torch.randn(arguments.tokens, width, **like, requires_grad=True)
    # A student that is near its teacher.
    teacher = student.detach() + 0.1 * torch.randn(arguments.tokens, width, **like)
    teacher_head.load_state_dict(head.state_dict())

    def forget() -> None:
        student.grad = head.weight.grad = None

    def step(loss: Loss) -> Tensor:
        forget()
        value = loss(student, teacher, head, teacher_head)
        value.backward()
        return value.detach()

    key = {"dtype": dtype, "head": "trainable" if trainable else "frozen"}
    away = {name: why for name in LOSSES if (why := why_not(name, device)) is not None}
    rows: list[dict[str, Any]] = [key | {"peer": name, "why": why} for name, why in away.items()]
    present = {name: loss for name, loss in LOSSES.items() if name not in away}
    values, peaks = {}, {}
    for name, loss in present.items():  # warms up, too
        forget()
        with measure.MemoryUse(device) as use:
            values[name] = float(step(loss))
        peaks[name] = use.peak - use.left
    actions = {name: lambda loss=loss: step(loss) for name, loss in present.items()}
    times = measure.interleave(actions, arguments.repeats, device, warmup=0)
    for name in present:
        rows.append(
            key
            | {
                "peer": name,
                "loss": values[name],
                "seconds": times[name],
                "to_naive": measure.ratio(times[name], times[NAIVE]),
                "peak_bytes": peaks[name],
                "peak_to_naive": round(peaks[name] / peaks[NAIVE], 4),
            }
        )
    return rows


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Markdown of what :func:`measure.record` gave: ``"loss"``."""
    rows, settings = record["rows"], record["settings"]
    given = settings["arguments"]
    lines = []
    for row in rows:
        if "why" in row:
            figures = [row["why"], "", "", ""]
        else:
            peak = measure.megabytes(row["peak_bytes"])
            share = f"{100 * row['peak_to_naive']:.1f} %"
            figures = [measure.shown(row["to_naive"]), peak, share, f"{row['loss']:.5f}"]
        lines.append([row["dtype"], row["head"], row["peer"], *figures])
    heads = ["type", "head", "loss", f"time / {NAIVE}", "peak", f"peak / {NAIVE}", "KL"]
    caption = (
        f"{given['tokens']} tokens, vocabulary {given['vocabulary']}, width {given['hidden']}, "
        f"{settings['machine']}:"
    )
    return {"loss": f"{caption}\n\n{measure.markdown(heads, lines)}{measure.earlier(record)}"}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, help="scored positions (2048; on a GPU 4096)")
    parser.add_argument("--vocabulary", type=int, help="(49152; on a GPU Llama-3.2-1B's 128256)")
    parser.add_argument("--hidden", type=int, help="width (576; on a GPU Llama-3.2-1B's 2048)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    arguments = parser.parse_args()
    dtypes = measure.begin(arguments)
    gpu = arguments.device.type == "cuda"
    arguments.tokens = arguments.tokens or (4096 if gpu else 2048)
    arguments.vocabulary = arguments.vocabulary or (128_256 if gpu else 49_152)
    arguments.hidden = arguments.hidden or (2048 if gpu else 576)
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        for trainable in (False, True):
            rows += compare(dtype, trainable, arguments)
    made = measure.record(arguments, rows)
    measure.finish(arguments, made, tables(made).values())


if __name__ == "__main__":
    main()
