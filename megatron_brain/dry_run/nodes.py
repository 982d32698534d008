"""The nodes that a run would be on."""

from megatron_brain.runtime import launch


def gpus_per_node(world_size: int) -> int:
    """GPUs of a node as the launcher says, else eight."""
    return min(launch.processes_of_node(default=8), world_size)
