"""Checks by fingerprints that all ranks, and a resumed run, read the same data, and says where they differ."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import xxhash

from megatron_brain.data.contents import Contents
from megatron_brain.data.corpus import Corpus, place_of
from megatron_brain.data.records import RecordReader
from megatron_brain.errors import AgreedError, UserError
from megatron_brain.files import explained
from megatron_brain.runtime.agreement import in_words, raise_on_all
from megatron_brain.runtime.parallel import Parallel

log = logging.getLogger(__name__)

T = TypeVar("T")


def read_on_all(read: Callable[[], T], parallel: Parallel) -> T:
    """What `read` returns on this rank. All ranks must call it. If it fails on one rank, all ranks raise.

    Raises:
        AgreedError: the message of the first rank that failed, with the ranks if not all have failed.
    """
    result, problem = None, None
    try:
        with explained():
            result = read()
    except UserError as error:
        problem = error
    raise_on_all(problem, parallel)
    return result


def require_same_data(corpus: Corpus, reader: RecordReader, name: str, parallel: Parallel) -> None:
    """Raise if a rank has read other items than rank 0. All ranks must call it.

    Args:
        corpus: what this rank has read.
        reader: the reader that has read it.
        name: name of the source, for the error.

    Raises:
        AgreedError: on all ranks. It names the ranks and the first record that differs.
    """
    mine = corpus.contents
    everyone: list[Contents] = parallel.gather_over_world(mine)
    others = [rank for rank, contents in enumerate(everyone) if contents != everyone[0]]
    if not others:
        return
    first, other = everyone[0], everyone[others[0]]
    if other.count != first.count:
        said = f"rank 0 has {first.count:,} records of it, rank {others[0]} {other.count:,}"
    elif (block := first.first_other_block(other)) is None:
        said = f"rank 0 and rank {others[0]} have other tokenizers or dates in the chat template"
    else:
        hashes = [(reader.hash(corpus.items[i]), place_of(corpus.items[i])) for i in block]
        told = parallel.gather_over_world(hashes if parallel.rank in (0, others[0]) else None)
        pairs = zip(told[0], told[others[0]], strict=True)
        (_, here), (_, there) = next(pair for pair in pairs if pair[0][0] != pair[1][0])
        said = f"the first that differs is {here} on rank 0, {there} on rank {others[0]}"
    raise AgreedError(
        f"{name}: ranks have read other records than rank 0 ({in_words(others)}): {said}. Is the file, or the "
        "tokenizer, another one on some node? Put one copy where all nodes see it"
    )


def require_same_rollouts(rollouts: Sequence[Any], path: str, parallel: Parallel) -> None:
    """Raise AgreedError on all ranks if one has read other rollouts from a file than rank 0. All ranks must call it."""
    told = [json.dumps(rollout.as_dict(), sort_keys=True) for rollout in rollouts]
    everyone = parallel.gather_over_world(xxhash.xxh3_64_hexdigest("\n".join(told).encode()))
    others = [rank for rank, found in enumerate(everyone) if found != everyone[0]]
    if others:
        raise AgreedError(
            f"{path}: {in_words(others)} have read other rollouts than rank 0. Is the file another one on some node? "
            "Put one copy where all nodes see it"
        )


def require_same_as_before(corpora: Mapping[str, Corpus], state: Mapping[str, Any] | None) -> None:
    """Raise if a resumed run would continue with other training data. Other validation data are logged only.

    Args:
        corpora: what was read, by the name of the flag.
        state: what `as_state` returned for the checkpoint. Old checkpoints have None.

    Raises:
        AgreedError: it names what differs and between which records.
    """
    if state is None:
        log.info("the checkpoint has no fingerprint of its data: only the number of records can be compared")
        return
    for flag, corpus in corpora.items():
        earlier = state.get(flag)
        if earlier is None:
            continue
        found = corpus.contents.difference(Contents.from_dict(earlier), partial(_place, corpus))
        if found is None:
            continue
        name = f"--{flag.replace('_', '-')}"
        if flag == "valid_data":
            log.warning("%s is not what the run was validated on before: %s", name, found)
            continue
        raise AgreedError(
            f"the run cannot be resumed: {name} is not what it was trained on so far: {found}. Resume with the same "
            "data, tokenizer and chat template, or start anew from the weights with --finetune"
        )


def _place(corpus: Corpus, index: int) -> str:
    return place_of(corpus.items[index])


def as_state(corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """The fingerprints that a checkpoint keeps."""
    return {flag: corpus.contents.as_dict() for flag, corpus in corpora.items()}
