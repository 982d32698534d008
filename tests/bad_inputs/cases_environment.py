"""Variables of torchrun, srun and mpirun that are incomplete, contradict each other or are not numbers."""

from __future__ import annotations

from bad_inputs.case import BadInput, Maker, Site

_WORLD = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
_SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}


def _train(site: Site) -> list[str]:
    return site.assets.sft_on(str(site.assets.records("sft")))


def _dry_run(*flags: str) -> Maker:
    return lambda site: [*_train(site), "--dry-run", *flags]


def _convert(site: Site) -> list[str]:
    return ["convert_hf_to_megatron", "--hf-model", str(site.assets.hf), "--save", "converted"]


_CURE = r"Start with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT on every process"
_UNSET = _CURE + r", or unset"


def _torchrun(name: str, culprit: str, cure: str = _CURE, **variables: str) -> BadInput:
    return BadInput(name, _train, culprit, cure, environment=variables)


def _launched(name: str, culprit: str, cure: str = _CURE, **variables: str) -> BadInput:
    return BadInput(name, _train, f"this process was started by {culprit}", cure, environment=variables)


CASES = [
    # Variables of torchrun.
    _torchrun("a size without a rank", r"WORLD_SIZE=2 is set and RANK is not", _UNSET, WORLD_SIZE="2"),
    _torchrun("a rank without a size", r"RANK=0 is set and WORLD_SIZE is not", _UNSET, RANK="0"),
    _torchrun("an empty rank", r"RANK='' is not a number of at least 0", _UNSET, **_WORLD | {"RANK": ""}),
    _torchrun("an empty size", r"WORLD_SIZE='' is not a number of at least 1", _UNSET, WORLD_SIZE=""),
    _torchrun("a size in words", r"WORLD_SIZE='two' is not a number", _UNSET, **_WORLD | {"WORLD_SIZE": "two"}),
    _torchrun("a size in powers", r"WORLD_SIZE='\xb2' is not a number", _UNSET, **_WORLD | {"WORLD_SIZE": "\xb2"}),
    _torchrun("no processes", r"WORLD_SIZE='0' is not a number of at least 1", _UNSET, WORLD_SIZE="0"),
    _torchrun("a rank below 0", r"RANK='-1' is not a number of at least 0", _UNSET, **_WORLD | {"RANK": "-1"}),
    _torchrun("a rank with a point", r"RANK='0.0' is not a number", _UNSET, **_WORLD | {"RANK": "0.0"}),
    _torchrun("a rank above the size", r"RANK=2 is not below WORLD_SIZE=2", _CURE, **_WORLD | {"RANK": "2"}),
    _torchrun("a local rank in words", r"LOCAL_RANK='x' is not a number", _UNSET, **_WORLD, LOCAL_RANK="x"),
    _torchrun("no address", r"RANK=0 and WORLD_SIZE=2 are set and MASTER_ADDR is not", RANK="0", WORLD_SIZE="2"),
    _torchrun("an empty address", r"WORLD_SIZE=2 are set and MASTER_ADDR is not", **_WORLD | {"MASTER_ADDR": ""}),
    _torchrun("no port", r"and MASTER_PORT is not", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"),
    _torchrun("a port in words", r"MASTER_PORT='x' is not a number", _UNSET, **_WORLD | {"MASTER_PORT": "x"}),
    _torchrun("a port too high", r"MASTER_PORT='99999'.* 1 to 65535", _UNSET, **_WORLD | {"MASTER_PORT": "99999"}),
    # Variables of other launchers.
    _launched(
        "srun without hosts", r"srun \(Slurm\), as SLURM_PROCID=0 of 2", r"set MASTER_ADDR and MASTER_PORT", **_SRUN
    ),
    _launched("srun without a size", r"srun \(Slurm\), .*how many", SLURM_PROCID="0", SLURM_STEP_ID="0"),
    _launched("srun's rank above the size", r"srun .* SLURM_PROCID=5, .*not below", **_SRUN | {"SLURM_PROCID": "5"}),
    _launched("another size than srun's", r"srun .*, and WORLD_SIZE=4 is set", r"Unset it", **_SRUN, WORLD_SIZE="4"),
    _torchrun("srun's rank in words", r"SLURM_PROCID='x' is not a number", _UNSET, **_SRUN | {"SLURM_PROCID": "x"}),
    _torchrun(
        "srun's hosts that are none",
        r"SLURM_STEP_NODELIST is .*'\[\['",
        r"set MASTER_ADDR",
        **_SRUN,
        SLURM_STEP_NODELIST="[[",
    ),
    _launched(
        "mpirun without an address",
        r"mpirun \(Open MPI\)",
        r"set MASTER_ADDR",
        OMPI_COMM_WORLD_RANK="0",
        OMPI_COMM_WORLD_SIZE="4",
    ),
    _launched("mpirun without a size", r"mpirun \(Open MPI\), .*how many", OMPI_COMM_WORLD_RANK="0"),
    _launched(
        "MVAPICH without an address",
        r"mpirun \(MVAPICH\)",
        r"set MASTER_ADDR",
        MV2_COMM_WORLD_RANK="0",
        MV2_COMM_WORLD_SIZE="4",
    ),
    _launched("mpiexec without an address", r"mpiexec \(PMI\)", r"set MASTER_ADDR", PMI_RANK="0", PMI_SIZE="4"),
    _launched("PMIx without a size", r"a PMIx launcher, .*how many", PMIX_RANK="0"),
    # The same in processes of their own.
    BadInput(
        "srun without hosts, as a process",
        _train,
        r"SLURM_PROCID=0 of 2",
        r"set MASTER_ADDR",
        environment=_SRUN,
        as_process=True,
    ),
    BadInput(
        "a rank above the size, as a process",
        _train,
        r"RANK=2 is not below WORLD_SIZE=2",
        _CURE,
        environment=_WORLD | {"RANK": "2"},
        as_process=True,
    ),
    BadInput(
        "a size without a rank, for a tool",
        _convert,
        r"WORLD_SIZE=2 is set and RANK is not",
        _UNSET,
        environment={"WORLD_SIZE": "2"},
        as_process=True,
    ),
    # Dry runs, which read only the size.
    BadInput(
        "a size in words, dry", _dry_run(), r"WORLD_SIZE='x' is not a number", _UNSET, environment={"WORLD_SIZE": "x"}
    ),
    BadInput(
        "a node's size in words, dry",
        _dry_run(),
        r"LOCAL_WORLD_SIZE='x' is not a number",
        _UNSET,
        environment={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "x"},
    ),
    BadInput(
        "a size that no batch divides, dry",
        _dry_run(),
        r"global_batch_size=2 is not a multiple",
        r"use 3",
        environment={"WORLD_SIZE": "3"},
    ),
]
