"""Counts the communication of a step: over replicas, an update of brain communicates as much as one of sft."""

import math
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.matrix import stage_flags, write_data
from distributed.runs import open_trainer, start
from distributed.world import Context, Layout, at
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.runtime import parallel

_WAYS = {
    "brain": (),
    "brain_two_pass": ("--two-pass",),
    "brain_cut_groups": ("--micro-batch-size", "1", "--max-tokens-per-micro-batch", "96"),
}
_OPTIMIZERS = {
    "replicated": (),
    "distributed": ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
}


@at(lambda layout: layout.name in ("dp2", "tp2_dp2", "pp2_interleaved_dp2"))
def case_brains_loss_adds_no_collective_over_replicas(layout: Layout, context: Context) -> None:
    if context.world_size == 1:
        write_data(context.shared)
        start("sft", context)
        return
    for optimizer, flags in _OPTIMIZERS.items():
        sft, _ = _second_step("sft", layout, context, *flags)
        assert any(elements > 1000 for _, elements in sft), f"{optimizer}: sft's gradients are not among {sft}"
        for way, extra in _WAYS.items():
            brain, stage = _second_step("brain", layout, context, *flags, *extra)
            differs = f"{way}, {optimizer}: {brain}, sft: {sft}"
            assert Counter(name for name, _ in brain) == Counter(name for name, _ in sft), differs
            # The report of a step has a sum and a count for each mean, and each maximum.
            report = 2 * len(stage.mean_metrics) + len(stage.max_metrics)
            assert sum(n for _, n in brain) - sum(n for _, n in sft) == report, differs


def case_groups_of_another_layout_are_destroyed(layout: Layout, context: Context) -> None:
    counts = []
    for tensor_parallel in (1, context.world_size, 1, context.world_size):
        parallel.start(ParallelConfig(tensor_model_parallel_size=tensor_parallel), seed=1)
        counts.append(len(dist.distributed_c10d._world.pg_map))
    assert counts[0] > 0 and len(set(counts)) == 1, counts


def _second_step(stage: str, layout: Layout, context: Context, *extra: str) -> tuple[list[tuple[str, int]], object]:
    """The stage, and the collectives over replicas in the second step, which gathers what the first one updated.

    The samples are drawn and scored before the count starts: only the update is counted.
    """
    flags = stage_flags(stage, context.shared, context.assets / "tokenizer")
    trainer = open_trainer(stage, [*flags, *layout.flags(), *extra])
    trainer.step(trainer.stage.micro_batches(trainer))
    micro_batches = trainer.stage.micro_batches(trainer)
    loss = trainer.stage.loss

    def counted_loss(output, batch):
        before = counter.calls
        result = loss(output, batch)
        assert counter.calls == before, "the loss of a micro-batch communicates"
        return result

    trainer.stage.loss = counted_loss
    with _Collectives(trainer.parallel) as counter:
        trainer.step(micro_batches)
    return counter.over_replicas, trainer.stage


class _Collectives(TorchDispatchMode):
    """Records the collectives that megatron-core and our code call on this rank. What two pipeline stages send to
    each other does not count.

    calls: collectives of any group. over_replicas: (name, elements) of those whose group has ranks of several
    replicas.
    """

    def __init__(self, parallel) -> None:
        super().__init__()
        self._replica = parallel.gather_over_world(parallel.dp_rank)
        self.calls = 0
        self.over_replicas: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "send" not in str(function) and "recv" not in str(function):
            self.calls += 1
            # The first argument of a collective is a tensor or a list of tensors.
            tensors = torch.utils._pytree.tree_leaves(args[0])
            [group] = [_group(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg)]
            if len({self._replica[rank] for rank in dist.get_process_group_ranks(group)}) > 1:
                self.over_replicas.append((str(function), sum(math.prod(tensor.shape) for tensor in tensors)))
        return function(*args, **(kwargs or {}))


def _is_group(argument: torch.ScriptObject) -> bool:
    return str(argument._type()).endswith(".ProcessGroup")


def _group(argument: torch.ScriptObject) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(argument)
