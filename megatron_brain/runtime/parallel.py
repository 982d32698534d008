"""Starts this process, alone or among those of a launcher, and gives the one object that holds all process groups."""

from __future__ import annotations

import datetime
import logging
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy
import torch
import torch.distributed as dist

from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.errors import ConfigError
from megatron_brain.runtime import cpu_backend
from megatron_brain.runtime.launch import read_launch

if TYPE_CHECKING:  # megatron-core must not be imported before the CPU backend is installed.
    from megatron.core.process_groups_config import ProcessGroupCollection

log = logging.getLogger(__name__)

T = TypeVar("T")

_host_group: dist.ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This process's place in the layout.

    Ranks and sizes are read from `groups` once. The first and last pipeline stages are those of the physical pipeline.
    """

    groups: ProcessGroupCollection
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    timeout: datetime.timedelta

    @property
    def is_first_pipeline_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_writer(self) -> bool:
        """The one process that writes files and prints: global rank 0."""
        return self.rank == 0

    def sum_over_data_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """Sum in place over data-parallel replicas."""
        dist.all_reduce(values, group=self.groups.dp)
        return values

    def broadcast_from_last_pipeline_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of the last pipeline stage, in place, to all pipeline stages of this replica."""
        if self.pp_size > 1:
            dist.broadcast(tensor, src=dist.get_process_group_ranks(self.groups.pp)[-1], group=self.groups.pp)
        return tensor

    def gather_over_data_parallel(self, item: T) -> list[T]:
        """Collect one picklable object from every data-parallel replica. Every replica gets all, in replica order."""
        items = [item] * self.dp_size
        dist.all_gather_object(items, item, group=self.groups.dp)
        return items

    @property
    def leads_replica(self) -> bool:
        """Whether this rank acts for its data-parallel replica where all ranks of the replica hold the same."""
        return self.tp_rank == 0 and self.is_first_pipeline_stage

    @property
    def layout(self) -> dict[str, int]:
        """Sizes of pipeline, tensor and data parallelism."""
        return {"pipeline": self.pp_size, "tensor": self.tp_size, "data": self.dp_size}

    def host_group(self) -> dist.ProcessGroup:
        """A gloo group of all ranks, for communication beside training. It is made once; all ranks must call this."""
        global _host_group
        if _host_group is None:
            group = dist.new_group(backend="gloo", timeout=self.timeout)
            assert isinstance(group, dist.ProcessGroup)
            _host_group = group
        return _host_group

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank of the world has it set. All ranks call it and get the same answer."""
        seen = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return tuple(flag != 0 for flag in seen.tolist())

    def gather_over_world(self, item: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Collect one picklable object from every rank, in rank order, on all ranks; `group` may be `host_group`."""
        items = [item] * self.world_size
        dist.all_gather_object(items, item, group=group)
        return items

    def claim_device(self) -> None:
        """Make this rank's device the current one of the calling thread: a new thread has the machine's first one."""
        torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        """Wait until this rank's device has done all work that it was given."""
        torch.cuda.synchronize()


def launched_world_size() -> int:
    """Number of processes that were started together; 1 for a process alone. It needs no process group.

    Raises:
        ConfigError: the environment does not tell.
    """
    return read_launch().world_size


def launched_device() -> torch.device:
    """The device of this process. It needs no process group."""
    if cpu_backend.needs_cpu_backend():
        return torch.device("cpu")
    launch = read_launch()
    if torch.cuda.device_count() == 1:  # Some launchers show each process only its own GPU.
        return torch.device("cuda", 0)
    if launch.local_rank is None and launch.world_size > 1:
        raise ConfigError(
            f"LOCAL_RANK is not set on rank {launch.rank} of {launch.world_size}: which of this node's GPUs is its own?"
        )
    return torch.device("cuda", launch.local_rank or 0)


def device_name(device: torch.device) -> str:
    """What a device is called, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def start(config: ParallelConfig, *, seed: int, num_layers: int | None = None) -> Parallel:
    """Join the world, make the process groups of the layout and seed every generator.

    The world is all processes that the launcher started, or this process alone. They communicate by NCCL on CUDA, by
    gloo elsewhere. A process may call this again, with another layout of the same world.
    """
    if cpu_backend.needs_cpu_backend():
        cpu_backend.install()
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    device = _join_world(timeout)

    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    _make_groups(config, virtual_pipeline_size(config, num_layers))
    if device.type == "cpu":
        # megatron-core's fused kernels are compiled at first use: a CPU run would wait for a C++ compiler.
        from megatron.core.jit import disable_jit_fuser

        disable_jit_fuser()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    parallel = Parallel(
        groups=groups,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        timeout=timeout,
    )
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed + 100 * parallel.pp_rank)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * parallel.pp_rank)
    return parallel


def _make_groups(config: ParallelConfig, virtual_pipeline_parallel_size: int | None) -> None:
    """Make megatron-core's process groups. Groups that are there already are kept if they are of the same layout.

    Groups of another layout are destroyed: the threads of a gloo group wake up a hundred times a second in every
    process.
    """
    from megatron.core import parallel_state

    layout = (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        virtual_pipeline_parallel_size,
    )
    if parallel_state.model_parallel_is_initialized():
        present = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        )
        if present == layout:
            return
        old = {group: name for name, group in vars(parallel_state).items() if isinstance(group, dist.ProcessGroup)}
        parallel_state.destroy_model_parallel()  # It destroys only the groups whose names end in _GLOO.
        for group, name in old.items():
            if not name.endswith("_GLOO"):
                dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )


def stop() -> None:
    """Leave the world."""
    global _host_group
    _host_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def virtual_pipeline_size(config: ParallelConfig, num_layers: int | None) -> int | None:
    """Number of model chunks of a pipeline stage; None where the schedule is not interleaved."""
    per_chunk = config.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return None
    assert num_layers is not None, "the interleaved schedule needs the number of layers before start-up"
    return num_layers // (config.pipeline_model_parallel_size * per_chunk)


def _join_world(timeout: datetime.timedelta) -> torch.device:
    device = launched_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    backend = "nccl" if cuda else "gloo"
    launch = read_launch()
    launch.export(os.environ)
    if launch.launcher is not None:
        log.info(
            "started by %s as rank %d of %d: waiting for the others at %s:%d (a shell of one process, as "
            "of srun --pty, works alone with RANK=0 WORLD_SIZE=1)",
            launch.launcher,
            launch.rank,
            launch.world_size,
            launch.address,
            launch.port,
        )
    if launch.is_alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart torchrun's store still has the addresses of the old processes, and gloo would connect to them.
        # The agents of several nodes count restarts separately; docs/clusters.md says what helps there.
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return device
