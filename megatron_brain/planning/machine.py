"""What a GPU and its links can do by their data sheets, and the share of it that is reached."""

from dataclasses import dataclass
from typing import Any

from megatron_brain.planning.workload import Precision

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU in a cluster. Rates are per second and without sparsity; links count one direction."""

    name: str

    fp8_flops: float
    """Dense FP8 matrix products."""

    bf16_flops: float
    """Dense bf16 matrix products and attention."""

    fp32_flops: float
    """float32 without tensor cores, which is PyTorch's default for matrix products."""

    memory_bytes: int
    """Memory that PyTorch sees."""

    memory_bandwidth: float

    node_bandwidth: float
    """NVLink, to all GPUs of the node together."""

    network_bandwidth: float
    """Network adapter of the GPU."""

    host_bandwidth: float
    """PCIe, between GPU and host memory."""

    gpus_per_node: int = 8

    efficiency: float
    """Share that is reached of every rate above, in (0, 1]: the only fitted number of the time model. `fit.py` makes it
    from published results, docs/planner.md shows how well it predicts others."""

    def compute_seconds(self, flops: float, precision: Precision) -> float:
        """Matrix products or attention."""
        peak = {"fp8": self.fp8_flops, "bf16": self.bf16_flops, "fp32": self.fp32_flops}[precision]
        return flops / (peak * self.efficiency)

    def memory_seconds(self, size: float) -> float:
        """`size` bytes to or from memory."""
        return size / (self.memory_bandwidth * self.efficiency)

    def host_seconds(self, size: float) -> float:
        """`size` bytes to or from host memory."""
        return size / (self.host_bandwidth * self.efficiency)

    def link_seconds(self, volume: float, *, size: int, stride: int) -> float:
        """A GPU of a ring over `size` ranks that are `stride` apart sends `volume` bytes."""
        return volume / (self.group_bandwidth(size, stride) * self.efficiency)

    def hop_seconds(self, volume: float, *, world_size: int) -> float:
        """A GPU sends `volume` bytes to the next pipeline stage. In a world of several nodes some stage is on another
        one than the next, and all keep its pace."""
        bandwidth = self.node_bandwidth if world_size <= self.gpus_per_node else self.network_bandwidth
        return volume / (bandwidth * self.efficiency)

    def group_bandwidth(self, size: int, stride: int) -> float:
        """Bandwidth of a GPU in a ring over `size` ranks that are `stride` apart.

        A ring leaves a node as often as nodes are in it, not as often as GPUs: with g members in a node, each member's
        adapter carries 1/g of the ring's traffic.
        """
        if size * stride <= self.gpus_per_node:
            return self.node_bandwidth
        members = max(1, self.gpus_per_node // stride)
        return min(self.node_bandwidth, members * self.network_bandwidth)


_H100: dict[str, Any] = {
    "fp8_flops": 1979e12,
    "bf16_flops": 989e12,
    "fp32_flops": 67e12,
    "node_bandwidth": 450e9,
    "network_bandwidth": 50e9,
    "host_bandwidth": 64e9,
    "efficiency": 0.6205,  # what fit.py makes of published.FITTED
}

MACHINES = {
    "h100": Machine(name="h100", memory_bytes=79 * GIB, memory_bandwidth=3.35e12, **_H100),
    # The H100's chip beside more and faster memory, so its efficiency is taken over.
    "h200": Machine(name="h200", memory_bytes=139 * GIB, memory_bandwidth=4.8e12, **_H100),
}
"""By --gpu. Sources: NVIDIA's H100 (SXM5) and H200 data sheets; NVLink 900 GB/s and PCIe 128 GB/s are both directions
together; one 400 Gb/s adapter for each GPU, as in a DGX H100."""
