"""The part of a dry run's report about what draws the responses."""

import shutil
import urllib.parse
from pathlib import Path

from megatron_brain.config.run import RunConfig
from megatron_brain.dry_run.nodes import gpus_per_node
from megatron_brain.files import folder_problem
from megatron_brain.planning.servers import sync_bytes
from megatron_brain.planning.summary import Row, fullest_rank, gib
from megatron_brain.planning.traffic import bytes_per_value
from megatron_brain.planning.workload import Layout, Workload

_KEPT = 3
"""Hand-overs of weights that the shared folder holds at the most: the last two, and one that is being written."""
_OF_ONE_MACHINE = {"btrfs", "devtmpfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"}
"""Types of file systems that only the machine itself sees, unless it exports them."""


def engine_rows(config: RunConfig, workload: Workload, layout: Layout) -> list[Row]:
    """Rows about the engine. Servers are not asked anything: most dry runs are where they cannot be reached."""
    engine = config.engine
    if engine.engine == "native":
        return [("engine", "native: our sampler, on the GPUs of the run")]
    servers = f"{len(engine.urls)} vLLM server{'' if len(engine.urls) == 1 else 's'}"
    rows = [
        ("engine", f"{servers}, not asked here: {', '.join(engine.urls)}"),
        ("requests", f"at most {engine.engine_concurrency} at one time to a server"),
        (
            "patience",
            f"a request is sent again after {engine.engine_request_timeout:g} s; the run stops after "
            f"{engine.engine_timeout:g} s",
        ),
    ]
    rows += _sync(config, workload, layout)
    rows.append(("check of a hand-over", f"at most {engine.max_engine_difference:g} nats a token from the trainer"))
    if workload.spec.rounds:
        rows += _rounds(config, workload, layout)
    return rows


def _sync(config: RunConfig, workload: Workload, layout: Layout) -> list[Row]:
    """What handing over the weights writes, and whether there is room for it."""
    place, size = config.engine.engine_sync_dir, sync_bytes(workload.model)
    assert place is not None
    share, precision = gib(size / layout.world_size), "bf16" if workload.model.bf16 else "float32"
    rows = [
        (
            "hand-over of weights",
            f"{gib(size)} in {precision} to a new folder in {place}, {share} by each process",
        ),
        ("disk space", f"{gib(_KEPT * size)}: the last two stay while one more is written"),
    ]
    if not Path(place).is_dir():
        return [*rows, ("shared folder", "not on this machine; trainer and servers must see the same one")]
    if (problem := folder_problem("--engine-sync-dir", place)) is not None:
        return [*rows, ("warning", problem)]
    free, kind = shutil.disk_usage(place).free, file_system(Path(place))
    rows.append(("shared folder", f"can be written to here, {gib(free)} free, on {kind}"))
    if free < _KEPT * size:
        rows.append(("warning", f"{place} has {gib(free)} free, and hand-overs take {gib(_KEPT * size)}"))
    others = [url for url in config.engine.urls if not _is_here(url)]
    if kind in _OF_ONE_MACHINE and others:
        rows.append(("warning", f"{place} is on {kind}, a disk of this machine: does {others[0]} see it?"))
    return rows


def _rounds(config: RunConfig, workload: Workload, layout: Layout) -> list[Row]:
    """Whether rounds are drawn ahead, and whose log q' makes the weights."""
    rows = [("log q'", f"that of the {config.brain.proposal_logprobs}; both are logged")]
    if not workload.rounds_ahead:
        return [*rows, ("rounds ahead", "none: servers and trainer wait for each other")]
    copy = bytes_per_value(workload) * fullest_rank(workload, layout)
    gpus = gpus_per_node(layout.world_size)
    return [
        *rows,
        ("rounds ahead", "1: servers draw the next round while this one is scored and trained on"),
        ("host memory for that", f"{gib(copy)} for each process, {gib(copy * gpus)} on a node: the weights that drew"),
    ]


def _is_here(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def file_system(folder: Path) -> str:
    """Type of the file system that an existing folder is on, as Linux names it, such as `ext4` or `nfs4`."""
    mounts = Path("/proc/self/mounts")
    if not mounts.is_file():
        return "an unknown file system"
    found = ("", "an unknown file system")
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split()
        point = point.encode().decode("unicode_escape")  # white space is written as \040
        if folder.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]
