"""The place of a process among the others, by the variables of its launcher."""

import pytest

from megatron_brain.errors import ConfigError
from megatron_brain.runtime import parallel
from megatron_brain.runtime.launch import Launch, first_host, is_reporting_rank, pretended_world_size, read_launch

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h1", "MASTER_PORT": "29400"}
# As a real srun of Slurm 22.05, mpirun of Open MPI 4.1 and mpiexec of MPICH 4.0 set them.
SRUN = {
    **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"},
    **{"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2"},
}
BATCH = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
MPIRUN = {
    **{"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    **{"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1", "PMIX_NAMESPACE": "prte-1@1"},
}
FLUX = {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_ID": "f1"}
JSRUN = {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        (TORCHRUN, Launch(rank=3, world_size=8, local_rank=1, address="h1", port=29400)),
        (TORCHRUN | SRUN | MPIRUN, Launch(rank=3, world_size=8, local_rank=1, address="h1", port=29400)),
        (SRUN | {"MASTER_PORT": "5"}, Launch(rank=3, world_size=4, local_rank=1, address="n1", port=5)),
        (
            SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "5"},
            Launch(rank=3, world_size=4, local_rank=1, address="a", port=5),
        ),
        (
            SRUN | {"WORLD_SIZE": "4", "MASTER_PORT": "5"},
            Launch(rank=3, world_size=4, local_rank=1, address="n1", port=5),
        ),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": "5"},)
        + (Launch(rank=3, world_size=4, local_rank=1, address="127.0.0.1", port=5),),
        (BATCH, Launch()),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch()),
        (MPIRUN | {"MASTER_PORT": "5"}, Launch(rank=1, world_size=2, local_rank=1, address="127.0.0.1", port=5)),
        (HYDRA | {"MASTER_PORT": "5"}, Launch(rank=1, world_size=2, local_rank=1, address="127.0.0.1", port=5)),
        # mpirun inside of a Slurm job: its processes inherit the variables of the daemon that srun started.
        (SRUN | MPIRUN | {"MASTER_PORT": "5"}, Launch(rank=1, world_size=2, local_rank=1, address="127.0.0.1", port=5)),
        (SRUN | HYDRA | {"MASTER_PORT": "5"}, Launch(rank=1, world_size=2, local_rank=1, address="127.0.0.1", port=5)),
        # srun --mpi=pmi2
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4", "MASTER_PORT": "5"},)
        + (Launch(rank=3, world_size=4, local_rank=1, address="n1", port=5),),
    ],
)
def test_rank_size_and_address_are_those_of_the_launcher(environment, expected):
    assert read_launch(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set and RANK is not: which one is this process"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is not a number of at least 1"),
        ({"RANK": "0"}, "RANK=0 is set and WORLD_SIZE is not"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK='' is not a number"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK='zero' is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a number of at least 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        (without(TORCHRUN, "MASTER_ADDR"), "RANK=3 and WORLD_SIZE=8 are set and MASTER_ADDR is not"),
        (without(TORCHRUN, "MASTER_PORT"), "RANK=3 and WORLD_SIZE=8 are set and MASTER_PORT is not"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
        (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_RANK='' is not a number"),
        (
            without(SRUN, "SLURM_STEP_NODELIST"),
            "started by srun .Slurm., as SLURM_PROCID=3 of 4, which does not say on which",
        ),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID=3, which does not say how many"),
        (SRUN | {"WORLD_SIZE": "8"}, "SLURM_STEP_NUM_TASKS=4, and WORLD_SIZE=8 is set"),
        (SRUN | {"SLURM_STEP_NODELIST": "[["}, "SLURM_STEP_NODELIST is not a list of hosts"),
        (
            without(MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE"),
            "mpirun .Open MPI., .* does not say on which host rank 0 is: set MASTER",
        ),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "does not say on which host rank 0 is: set MASTER_ADDR"),
        (HYDRA | {"PMI_RANK": "5"}, "PMI_RANK=5, which is not below PMI_SIZE=2"),
        ({"PMIX_RANK": "0"}, "a PMIx launcher, as PMIX_RANK=0, which does not say how many"),
    ],
)
def test_what_says_too_little_or_contradicts_itself_is_refused_with_the_cure(environment, message):
    with pytest.raises(ConfigError, match=message) as refused:
        read_launch(environment)
    assert "torchrun" in str(refused.value) or "MASTER_ADDR" in str(refused.value) or "nset" in str(refused.value)


def test_all_processes_of_a_job_come_to_one_port_and_other_jobs_to_others():
    ranks = [read_launch(SRUN | {"SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert len({(launch.address, launch.port) for launch in ranks}) == 1 and 1024 < ranks[0].port < 32768
    assert read_launch(SRUN | {"SLURM_JOB_ID": "8"}).port != ranks[0].port
    assert read_launch(SRUN | {"SLURM_STEP_ID": "1"}).port != ranks[0].port
    # Processes that are started through a script each, or on several nodes, have no parent in common.
    assert read_launch(HYDRA).port == read_launch(HYDRA | {"PMI_RANK": "0"}).port == 29500


def test_what_is_taken_is_said_as_torchrun_says_it():
    environment = dict(SRUN)
    read_launch(environment).export(environment)
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"},
    }
    assert read_launch(environment) == read_launch(SRUN)
    alone: dict[str, str] = {}
    read_launch(alone).export(alone)
    assert not alone


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("n[01-04,7],login", "n01"), ("gpu-3,gpu-7", "gpu-3"), ("a[007]-b,c", "a007-b")],
)
def test_the_first_host_of_a_list_as_slurm_writes_it(nodes, first):
    assert first_host(nodes) == first


def test_one_process_tells_what_all_find_also_where_they_do_not_know_of_each_other():
    assert is_reporting_rank({}) and is_reporting_rank(TORCHRUN | {"RANK": "0"}) and not is_reporting_rank(TORCHRUN)
    assert not is_reporting_rank(without(SRUN, "SLURM_STEP_NODELIST"))
    assert is_reporting_rank(SRUN | {"SLURM_PROCID": "0"})
    assert is_reporting_rank({"RANK": "zero"}), "what is wrong is told"


def test_a_dry_run_needs_no_rank():
    assert pretended_world_size({"WORLD_SIZE": "64"}) == 64 and pretended_world_size({}) == 1
    assert pretended_world_size(SRUN) == 4
    with pytest.raises(ConfigError, match="WORLD_SIZE='many'"):
        pretended_world_size({"WORLD_SIZE": "many"})


@pytest.mark.parametrize(("gpus", "local_rank", "device"), [(8, "3", 3), (1, "3", 0), (1, None, 0), (8, None, None)])
def test_a_rank_takes_its_own_gpu_or_the_only_one_that_it_is_shown(gpus, local_rank, device, monkeypatch):
    monkeypatch.setattr(parallel.cpu_backend, "needs_cpu_backend", lambda: False)
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: gpus)
    environment = TORCHRUN | ({"LOCAL_RANK": local_rank} if local_rank else {})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK")
    if device is None:
        with pytest.raises(ConfigError, match="LOCAL_RANK is not set on rank 3 of 8"):
            parallel.launched_device()
        return
    assert parallel.launched_device().index == device


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (SRUN | {"MASTER_PORT": "5"}, "srun (Slurm)"),
        (MPIRUN, "mpirun (Open MPI)"),
        (HYDRA, "mpiexec (PMI)"),
        (FLUX | {"MASTER_ADDR": "a"}, "flux run"),
        (JSRUN | {"MASTER_ADDR": "a"}, "jsrun"),
        (TORCHRUN, None),
        ({}, None),
    ],
)
def test_what_started_a_process_is_named(environment, launcher):
    assert read_launch(environment).launcher == launcher


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (FLUX, r"flux run, as FLUX_TASK_RANK=1 of 2, which does not say on which host rank 0 is: set MASTER_ADDR"),
        (JSRUN, r"jsrun, as JSM_NAMESPACE_RANK=1 of 2, which does not say on which host"),
        (
            {"PALS_RANKID": "1", "PALS_LOCAL_SIZE": "2"},
            r"\(PALS\), as PALS_RANKID=1, which does not say how many there are",
        ),
    ],
)
def test_launchers_that_say_too_little_start_no_run_of_one(environment, message):
    with pytest.raises(ConfigError, match=message):
        read_launch(environment)
    assert not is_reporting_rank(environment)
