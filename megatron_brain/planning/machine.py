"""The rates of a GPU and its links by their data sheets, and the share of them that a run reaches."""

from dataclasses import dataclass
from typing import Any

from megatron_brain.planning.workload import Precision

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU in a cluster. Rates are per second and without sparsity; links count one direction."""

    name: str

    fp8_flops: float
    """Rate of dense FP8 matrix products."""

    bf16_flops: float
    """Rate of dense bf16 matrix products and attention."""

    fp32_flops: float
    """Rate of float32 matrix products without tensor cores, which is PyTorch's default."""

    memory_bytes: int
    """Memory that PyTorch sees."""

    memory_bandwidth: float

    node_bandwidth: float
    """NVLink: bandwidth to all GPUs of the node together."""

    network_bandwidth: float
    """Bandwidth of the GPU's network adapter."""

    host_bandwidth: float
    """PCIe: bandwidth between GPU and host memory."""

    storage_bandwidth: float
    """Bandwidth of a node to the storage that all nodes share, to read or to write, as reached: no share is taken."""

    gpus_per_node: int = 8

    efficiency: float
    """Share of every rate above that a run reaches, in (0, 1]: the only fitted number of the time model. `fit.py` fits
    it to published results, docs/planner.md shows how well it predicts others."""

    def compute_seconds(self, flops: float, precision: Precision) -> float:
        """Seconds of `flops` operations of matrix products or attention."""
        peak = {"fp8": self.fp8_flops, "bf16": self.bf16_flops, "fp32": self.fp32_flops}[precision]
        return flops / (peak * self.efficiency)

    def memory_seconds(self, size: float) -> float:
        """Seconds to read or write `size` bytes of memory."""
        return size / (self.memory_bandwidth * self.efficiency)

    def host_seconds(self, size: float) -> float:
        """Seconds to move `size` bytes to or from host memory."""
        return size / (self.host_bandwidth * self.efficiency)

    def storage_seconds(self, size: float) -> float:
        """Seconds in which one node reads or writes `size` bytes of shared storage."""
        return size / self.storage_bandwidth

    def link_seconds(self, volume: float, *, size: int, stride: int) -> float:
        """Seconds in which a GPU of a ring over `size` ranks that are `stride` apart sends `volume` bytes."""
        return volume / (self.group_bandwidth(size, stride) * self.efficiency)

    def hop_seconds(self, volume: float, *, world_size: int) -> float:
        """Seconds in which a GPU sends `volume` bytes to the next pipeline stage. In a world of several nodes some hop
        leaves its node, and all the others keep its pace."""
        bandwidth = self.node_bandwidth if world_size <= self.gpus_per_node else self.network_bandwidth
        return volume / (bandwidth * self.efficiency)

    def group_bandwidth(self, size: int, stride: int) -> float:
        """Bandwidth of a GPU in a ring over `size` ranks that are `stride` apart.

        A ring leaves a node once for each node in it, not once for each GPU: with g members in a node, each member's
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
    "storage_bandwidth": 5e9,  # no data sheet says it: ours
    "efficiency": 0.6205,  # fitted by fit.py to published.FITTED
}

MACHINES = {
    "h100": Machine(name="h100", memory_bytes=79 * GIB, memory_bandwidth=3.35e12, **_H100),
    # It has the H100's chip with more and faster memory, so the H100's efficiency is used.
    "h200": Machine(name="h200", memory_bytes=139 * GIB, memory_bandwidth=4.8e12, **_H100),
}
"""The machines by the name for --gpu. Sources: NVIDIA's H100 (SXM5) and H200 data sheets, which give NVLink (900 GB/s)
and PCIe (128 GB/s) for both directions together. Each GPU has one 400 Gb/s adapter, as in a DGX H100."""
