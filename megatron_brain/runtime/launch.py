"""Finds out who started this process, and its place among the others, before torch is imported.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun, mpirun and mpiexec have variables of
their own, which are used where they tell rank, number and address of the processes. Where they tell only some of that,
the start is refused: otherwise each process would take itself for rank 0 of 1, and all would write into one --save.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

from megatron_brain.errors import ConfigError, OwnError

_FIRST_PORT, _PORTS, _LAST_PORT = 20_000, 10_000, 65_535
_DEFAULT_PORT = 29_500
"""torchrun's port, for jobs whose launcher gives them no name."""
_CURE = "Start with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT on every process"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of this process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """Number of this process on its node; None where it is not known."""
    address: str | None = None
    """Host of rank 0; None where there is no other process to find."""
    port: int | None = None
    launcher: str | None = field(default=None, compare=False)
    """Name of the launcher that started this process, if it was not torchrun."""

    @property
    def is_alone(self) -> bool:
        """Whether this process needs no other, and so has no address to meet others at."""
        return self.address is None

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Set torchrun's variables, which torch and megatron-core read."""
        if self.address is None:
            return
        environment.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size))
        environment.update(MASTER_ADDR=self.address, MASTER_PORT=str(self.port))
        if self.local_rank is not None:
            environment["LOCAL_RANK"] = str(self.local_rank)


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """Names of a launcher's variables."""

    name: str
    rank: str
    size: tuple[str, ...]
    local_rank: str
    local_size: str | None = None
    """Processes on this node."""
    job: tuple[str, ...] = ()
    """Variables that have the same value on all processes of a job, and another value in another job."""
    needs: str | None = None
    """A variable that must be set too, or the others are ignored."""


_SLURM = _Launcher(
    name="srun (Slurm)",
    rank="SLURM_PROCID",
    size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    local_rank="SLURM_LOCALID",
    job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    needs="SLURM_STEP_ID",  # A batch script, which is one process, has the other variables too.
)
_PMI = _Launcher(
    name="mpiexec (PMI)",
    rank="PMI_RANK",
    size=("PMI_SIZE",),
    local_rank="MPI_LOCALRANKID",
    local_size="MPI_LOCALNRANKS",
)
# The first one found is believed. In a Slurm job, mpirun starts its daemons by srun: its processes have srun's
# variables too.
_LAUNCHERS = (
    _Launcher(
        name="mpirun (Open MPI)",
        rank="OMPI_COMM_WORLD_RANK",
        size=("OMPI_COMM_WORLD_SIZE",),
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Launcher(
        name="mpirun (MVAPICH)",
        rank="MV2_COMM_WORLD_RANK",
        size=("MV2_COMM_WORLD_SIZE",),
        local_rank="MV2_COMM_WORLD_LOCAL_RANK",
        local_size="MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _PMI,
    _Launcher(
        name="flux run",
        rank="FLUX_TASK_RANK",
        size=("FLUX_JOB_SIZE",),
        local_rank="FLUX_TASK_LOCAL_ID",
        job=("FLUX_JOB_ID",),
    ),
    _Launcher(
        name="jsrun",
        rank="JSM_NAMESPACE_RANK",
        size=("JSM_NAMESPACE_SIZE",),
        local_rank="JSM_NAMESPACE_LOCAL_RANK",
        local_size="JSM_NAMESPACE_LOCAL_SIZE",
    ),
    _SLURM,
    _Launcher(name="mpiexec (PALS)", rank="PALS_RANKID", size=(), local_rank=""),
    _Launcher(name="a PMIx launcher", rank="PMIX_RANK", size=(), local_rank="", job=("PMIX_NAMESPACE",)),
)


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """The place of this process among the others, as the environment's variables tell it.

    Raises:
        ConfigError: the variables tell too little, or contradict each other.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment:
        return _by_torchrun(environment)
    launcher = _launcher_of(environment)
    if launcher is not None:
        return _by_launcher(launcher, environment)
    size = _number(environment, "WORLD_SIZE", least=1) if "WORLD_SIZE" in environment else 1
    if size > 1:
        raise ConfigError(f"WORLD_SIZE={size} is set and RANK is not: which one is this process? {_CURE}, or unset it")
    return Launch()


def pretended_world_size(environment: Mapping[str, str] | None = None) -> int:
    """Number of processes that a dry run pretends there are: WORLD_SIZE, which a dry run reads without RANK.

    Raises:
        ConfigError: WORLD_SIZE is not a number.
    """
    environment = os.environ if environment is None else environment
    if "WORLD_SIZE" in environment:
        return _number(environment, "WORLD_SIZE", least=1)
    return read_launch(environment).world_size


def processes_of_node(default: int, environment: Mapping[str, str] | None = None) -> int:
    """Number of processes that torchrun started on this node (LOCAL_WORLD_SIZE); the default where that is not set.

    Raises:
        ConfigError: LOCAL_WORLD_SIZE is not a number.
    """
    environment = os.environ if environment is None else environment
    return _number(environment, "LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in environment else default


def is_reporting_rank(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process prints the messages that are the same on all ranks."""
    environment = os.environ if environment is None else environment
    names = ("RANK", *(launcher.rank for launcher in _LAUNCHERS))
    first = next((environment[name] for name in names if environment.get(name)), "0")
    return not first.isdecimal() or int(first) == 0


def first_host(nodes: str) -> str:
    """The first host of a list that Slurm wrote, such as ``n[01-04,7],login``.

    Raises:
        ConfigError: the text is not such a list.
    """
    match = re.match(r"([^,\[\]]*)(?:\[(\w+)[^\]]*\]([^,\[\]]*))?(?:,|$)", nodes)
    if match is None or not match[0].strip(","):
        raise ConfigError(f"not a list of hosts: {nodes!r}")
    return "".join(part for part in match.groups() if part)


def _by_torchrun(environment: Mapping[str, str]) -> Launch:
    if "WORLD_SIZE" not in environment:
        raise ConfigError(f"RANK={environment['RANK']} is set and WORLD_SIZE is not. {_CURE}, or unset RANK")
    size, rank = _number(environment, "WORLD_SIZE", least=1), _own_number(environment, "RANK")
    if rank >= size:
        raise OwnError(f"RANK={rank} is not below WORLD_SIZE={size}: ranks are counted from 0. {_CURE}")
    local_rank = _own_number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else None
    address, port = environment.get("MASTER_ADDR"), None
    if address:
        port = _given_port(environment)
    if size > 1 and not (address and port):
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={size} are set and {missing} is not. {_CURE}")
    meets = bool(address and port)
    return Launch(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        address=address if meets else None,
        port=port if meets else None,
    )


def _launcher_of(environment: Mapping[str, str]) -> _Launcher | None:
    """The launcher that started this process, if one did."""
    found = [
        launcher
        for launcher in _LAUNCHERS
        if launcher.rank in environment and (launcher.needs is None or launcher.needs in environment)
    ]
    if not found:
        return None
    if found[0] is _PMI and _SLURM in found and _same_place(_PMI, _SLURM, environment):
        return _SLURM  # srun --mpi=pmi2 started it; Slurm's variables tell the hosts too, those of PMI do not.
    return found[0]


def _same_place(one: _Launcher, other: _Launcher, environment: Mapping[str, str]) -> bool:
    """Whether two launchers give this process the same rank among the same number of processes."""
    places = [
        (environment[launcher.rank], next((environment[name] for name in launcher.size if name in environment), None))
        for launcher in (one, other)
    ]
    return places[0] == places[1]


def _by_launcher(launcher: _Launcher, environment: Mapping[str, str]) -> Launch:
    rank = _own_number(environment, launcher.rank)
    size_name = next((name for name in launcher.size if name in environment), None)
    started = f"this process was started by {launcher.name}, as {launcher.rank}={rank}"
    if size_name is None:
        raise ConfigError(f"{started}, which does not say how many there are. {_CURE}")
    size = _number(environment, size_name, least=1)
    if rank >= size:
        raise OwnError(f"{started}, which is not below {size_name}={size}. {_CURE}")
    asked = _number(environment, "WORLD_SIZE", least=1) if "WORLD_SIZE" in environment else size
    if asked != size:
        raise ConfigError(f"{started} of {size_name}={size}, and WORLD_SIZE={asked} is set. Unset it, or set RANK too")
    if size == 1:
        return Launch()
    address = environment.get("MASTER_ADDR") or _address(launcher, environment, size)
    if address is None:
        raise ConfigError(
            f"{started} of {size}, which does not say on which host rank 0 is: set MASTER_ADDR and MASTER_PORT on "
            "every process, or start with torchrun"
        )
    port = _given_port(environment) or _port(launcher, environment)
    local_rank = _own_number(environment, launcher.local_rank) if launcher.local_rank in environment else None
    return Launch(rank=rank, world_size=size, local_rank=local_rank, address=address, port=port, launcher=launcher.name)


def _address(launcher: _Launcher, environment: Mapping[str, str], size: int) -> str | None:
    """Host of rank 0; None where the launcher does not tell it."""
    if launcher.local_size is not None and environment.get(launcher.local_size) == str(size):
        return "127.0.0.1"
    if launcher.rank != "SLURM_PROCID":
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    if environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    try:
        return first_host(nodes)
    except ConfigError as error:
        raise ConfigError(f"SLURM_STEP_NODELIST is {error}: set MASTER_ADDR") from error


def _port(launcher: _Launcher, environment: Mapping[str, str]) -> int:
    """A port that all processes of a job compute alike. Jobs that have a name mostly get different ports."""
    job = [environment[name] for name in launcher.job if name in environment]
    return _FIRST_PORT + zlib.crc32(" ".join(job).encode()) % _PORTS if job else _DEFAULT_PORT


def _given_port(environment: Mapping[str, str]) -> int | None:
    return _number(environment, "MASTER_PORT", least=1, most=_LAST_PORT) if "MASTER_PORT" in environment else None


def _number(environment: Mapping[str, str], name: str, *, least: int = 0, most: int | None = None) -> int:
    text = environment[name].strip()
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"{name}={environment[name]!r} is not a number of {allowed}. {_CURE}, or unset it")
    return int(text)


def _own_number(environment: Mapping[str, str], name: str) -> int:
    """A number that differs between processes, or between the processes of a node."""
    try:
        return _number(environment, name)
    except ConfigError as error:
        raise OwnError(str(error)) from error
