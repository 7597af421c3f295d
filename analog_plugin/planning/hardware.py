"""GPUs as their makers describe them."""

from __future__ import annotations

from dataclasses import dataclass

from analog_plugin.errors import AnalogError, shown


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and how it is connected.

    Args:
        name: What it is called on the command line.
        memory: Bytes.
        flops: Dense half-precision operations a second, a multiplication and an addition as two.
        bandwidth: Of its memory, bytes a second.
        link: Bytes a second that it sends to others in its node, while it receives as many.
        network: The same to other nodes: its share of the node's network.
        in_node: GPUs of a node.
        bf16: Whether it computes in bfloat16; else float16 is meant.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    in_node: int = 8
    bf16: bool = True

    @classmethod
    def named(cls, name: str) -> Gpu:
        """One of :data:`GPUS`.

        Raises:
            AnalogError: There is none of this name.
        """
        if name not in GPUS:
            raise AnalogError(f"gpu is {shown(name)}, but must be one of {', '.join(GPUS)}.")
        return GPUS[name]


#: From NVIDIA's data sheets (SXM modules, dense figures). Networks are those of its DGX servers of
#: the generation: 100 Gbit/s for two V100, 200 Gbit/s for an A100, 400 Gbit/s for an H100 or H200.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="v100",
            memory=32e9,
            flops=125e12,
            bandwidth=0.9e12,
            link=150e9,
            network=6.25e9,
            bf16=False,
        ),
        Gpu(name="a100", memory=80e9, flops=312e12, bandwidth=2.04e12, link=300e9, network=25e9),
        Gpu(name="h100", memory=80e9, flops=989e12, bandwidth=3.35e12, link=450e9, network=50e9),
        Gpu(name="h200", memory=141e9, flops=989e12, bandwidth=4.8e12, link=450e9, network=50e9),
    )
}
