"""Which loaders take a directory, and why others do not: one table of rules for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What the rules ask for.

    Args:
        kind: See :class:`~analog_plugin.inspection.reader.Inspection`.
        broken: Weights or ``config.json`` cannot be read.
        faulty: There are problems of any kind.
        refused: What transformers says against the configuration; None: nothing.
        layout: Format of the quantized weights; None: nothing is quantized.
        weight_bits: That loaders are told of; none: full precision.
        inputs: ``"static"``, ``"dynamic"`` or None.
        outputs: Whether outputs are quantized.
        foreign: Quantized by a method that is not compressed-tensors'.
        integer: Everything that is quantized is so to symmetric integers.
        unequal: Scales differ within q/k/v or gate/up.
        split: Only some of q/k/v, or one of gate/up, are quantized.
        head_size: Of the attention; None: not known.
    """

    kind: str
    broken: bool = False
    faulty: bool = False
    refused: str | None = None
    layout: str | None = None
    weight_bits: frozenset[int] = frozenset()
    inputs: str | None = None
    outputs: bool = False
    foreign: bool = False
    integer: bool = True
    unequal: bool = False
    split: bool = False
    head_size: int | None = None


@dataclass(frozen=True)
class Loader:
    """A loader's answer.

    Args:
        name: What to call.
        takes: Whether it takes the directory; None: not known here.
        reason: Why not, or what to know; ``""``: nothing.
    """

    name: str
    takes: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Rule:
    """Of the first rule that applies, the answer holds."""

    applies: Callable[[Facts], bool]
    takes: bool | None
    reason: str = ""


_UNREADABLE = Rule(lambda f: f.broken, False, "its files cannot be read, see the problems")
_NO_MODEL = Rule(lambda f: f.kind in ("conductances", "nothing"), False, "it holds no model")

TRANSFORMERS = (
    _NO_MODEL,
    _UNREADABLE,
    Rule(lambda f: f.kind == "adapter", True, "with peft, which loads its base model too"),
    Rule(lambda f: f.refused is not None, False, "{refused}"),
    Rule(lambda f: f.faulty, None, "what it makes of the problems is not known"),
    Rule(
        lambda f: f.kind == "analog-fp" and f.inputs is not None,
        True,
        "as the digital model with quantized inputs",
    ),
    Rule(lambda f: True, True),
)

ANALOG = (
    _NO_MODEL,
    Rule(lambda f: f.kind == "adapter", False, "it holds an adapter; load it with peft"),
    Rule(
        lambda f: f.kind == "plain",
        False,
        "it holds no analog state; optimum-cli export analog makes an analog model of it",
    ),
    Rule(
        lambda f: f.kind != "analog-fp",
        False,
        "it is purely digital; give a directory of the profile analog-fp",
    ),
    Rule(lambda f: f.faulty, False, "see the problems"),
    Rule(lambda f: True, True),
)

# Of vLLM 0.32. Integers, symmetric, one scale a channel; inputs with one scale a tensor.
VLLM = (
    _NO_MODEL,
    _UNREADABLE,
    Rule(lambda f: f.kind == "adapter", False, "it holds an adapter, which needs its base model"),
    Rule(lambda f: f.faulty, None, "what it makes of the problems is not known"),
    Rule(lambda f: f.foreign or not f.integer, None, "its kernels for this are not listed here"),
    Rule(
        lambda f: f.layout is not None and not f.weight_bits,
        False,
        "vLLM has no kernel for full-precision weights with quantized inputs",
    ),
    Rule(
        lambda f: f.layout == "pack-quantized" and f.inputs == "static" and not f.outputs,
        False,
        "vLLM has no kernel for packed weights with static inputs",
    ),
    Rule(
        lambda f: (
            f.layout is not None and f.weight_bits != {8} and f.inputs == "static" and not f.outputs
        ),
        False,
        "vLLM has no kernel for weights of fewer than 8 bits with static inputs",
    ),
    Rule(lambda f: f.split, False, "vLLM wants q/k/v, and gate/up, quantized alike"),
    Rule(
        lambda f: f.head_size is not None and f.head_size < 32,
        False,
        "on a CPU its attention needs a head size of 32 or more",
    ),
    Rule(lambda f: f.layout is None and f.kind in ("plain", "analog-fp"), True),
    Rule(
        lambda f: f.unequal,
        True,
        "but it takes one scale for all of q/k/v and of gate/up, and those differ here",
    ),
    Rule(
        lambda f: f.outputs and f.inputs == "static" and f.weight_bits == {4},
        True,
        "on a CPU in bfloat16; inputs and outputs are rounded in floats",
    ),
    Rule(
        lambda f: f.outputs and f.inputs == "static",
        None,
        "on a CPU it has no kernel for such weights with quantized outputs",
    ),
    Rule(lambda f: f.layout == "int-quantized" and f.weight_bits == {8}, True),
    Rule(lambda f: f.layout == "pack-quantized" and f.inputs is None, True),
    Rule(lambda f: True, None, "its kernels for this are not listed here"),
)

TABLE = {
    "AutoModelForCausalLM": TRANSFORMERS,
    "AnalogModelForCausalLM": ANALOG,
    "vLLM": VLLM,
}


def loaders(facts: Facts) -> tuple[Loader, ...]:
    """Every loader's answer."""
    found = []
    for name, rules in TABLE.items():
        rule = next(rule for rule in rules if rule.applies(facts))
        found.append(Loader(name, rule.takes, rule.reason.format(refused=facts.refused)))
    return tuple(found)
