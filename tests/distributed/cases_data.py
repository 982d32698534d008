"""A run has the same ids on all ranks and on every day."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from distributed.runs import flags_of, open_trainer, random_start, step
from distributed.world import Context, Layout, at
from megatron_brain.errors import AgreedError

_two = at(lambda layout: layout.name in ("tp2", "dp2"))
_DATED = (
    "{{ strftime_now('%d %b %H:%M') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_NOW = "megatron_brain.training.start.now"


def _chats(changed: int | None = None) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"package {number}"},
                {"role": "assistant", "content": "a tool" if number == changed else "a game"},
            ]
        }
        for number in range(20)
    ]


def _write(path: Path, records: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _flags(layout: Layout, context: Context, data: str, *extra: str) -> list[str]:
    return flags_of("sft", layout, context, *random_start(context), "--train-iters", "3", "--train-data", data, *extra)


def _folder(layout: Layout, context: Context, name: str) -> Path:
    return context.shared / f"{name}_{context.world_size}_{layout.name}"


@_two
def case_one_date_for_all_ranks_and_days(layout: Layout, context: Context) -> None:
    """Rank 0's clock at the start decides, for any clocks of other nodes and any day of a resume."""
    folder = _folder(layout, context, "dated")
    data = _write(folder / f"data_{_rank()}.jsonl", _chats())
    template = folder / f"template_{_rank()}.jinja"
    template.write_text(_DATED)
    run = str(folder / "run")
    flags = _flags(layout, context, data, "--chat-template", str(template), "--save", run, "--auto-resume")
    days = iter(["2026-11-30T23:59:58", "2026-12-24T08:00:00"])

    def open_today():
        day = next(days)
        with mock.patch(_NOW, lambda: day if _rank() == 0 else "1999-01-01T00:00:00"):
            return open_trainer("sft", flags)

    trainer = open_today()
    assert trainer.config.tokenizer.template_date == "2026-11-30T23:59:58"
    first = _texts(trainer, context)
    assert first[0].startswith("30 Nov 23:59")
    step(trainer)
    trainer.save()
    trainer.finish_saving()
    resumed = open_today()
    assert resumed.iteration == 1 and _texts(resumed, context) == first
    assert resumed.config.tokenizer.template_date == "2026-11-30T23:59:58"
    message = "the date in the chat template was 2026-11-30T23:59:58, now it is 2026-12-24T00:00:00"
    with pytest.raises(AgreedError, match=message):
        open_trainer("sft", [*flags, "--template-date", "2026-12-24"])


@_two
def case_a_rank_with_another_file_is_named(layout: Layout, context: Context) -> None:
    """A node may have its own copy of a file, with another length or with an edited record."""
    folder, last = _folder(layout, context, "files"), context.world_size - 1
    is_other = _rank() == last and last > 0
    template = folder / f"template_{_rank()}.jinja"
    same = _write(folder / f"same_{_rank()}.jsonl", _chats())
    template.write_text(_DATED.replace("{{ strftime_now('%d %b %H:%M') }}\n", ""))
    with_template = "--chat-template", str(template)
    open_trainer("sft", _flags(layout, context, same, *with_template))
    shorter = _write(folder / f"shorter_{_rank()}.jsonl", _chats()[: 19 if is_other else 20])
    edited = _write(folder / f"edited_{_rank()}.jsonl", _chats(13 if is_other else None))
    if last == 0:
        return
    with pytest.raises(AgreedError, match=rf"rank {last}\): rank 0 has 20 records of it, rank {last} 19.*one copy"):
        open_trainer("sft", _flags(layout, context, shorter, *with_template))
    with pytest.raises(AgreedError, match=rf"edited_0.jsonl:14 on rank 0, .*edited_{last}.jsonl:14 on rank {last}"):
        open_trainer("sft", _flags(layout, context, edited, *with_template))


@_two
def case_what_one_rank_alone_finds_wrong_stops_all(layout: Layout, context: Context) -> None:
    """No rank waits for a rank that has stopped."""
    folder, last = _folder(layout, context, "one_rank"), context.world_size - 1
    if last == 0:
        return
    is_other = _rank() == last
    template = folder / f"template_{_rank()}.jinja"
    folder.mkdir(exist_ok=True)
    template.write_text(_DATED.replace("{{ strftime_now('%d %b %H:%M') }}\n", ""))
    missing = folder / ("missing.jsonl" if is_other else f"there_{_rank()}.jsonl")
    if not is_other:
        _write(missing, _chats())
    with pytest.raises(AgreedError, match=rf"missing.jsonl: no such file.*\(rank {last} alone\)"):
        open_trainer("sft", _flags(layout, context, str(missing), "--chat-template", str(template)))
    bad = _write(folder / f"bad_{_rank()}.jsonl", [*_chats(), {"messages": []}])
    with pytest.raises(AgreedError, match=r"bad_0.jsonl:21: "):
        open_trainer("sft", _flags(layout, context, bad, "--chat-template", str(template)))
    for with_clock in (is_other, not is_other):
        dated = folder / f"dated_{_rank()}.jinja"
        dated.write_text(_DATED if with_clock else template.read_text())
        with pytest.raises(AgreedError, match=r"other chat templates, of which one writes the date"):
            open_trainer("sft", _flags(layout, context, str(missing), "--chat-template", str(dated)))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _texts(trainer, context: Context) -> list[str]:
    """The items of the training data as texts, which are equal on all ranks."""
    from megatron_brain.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer("HuggingFaceTokenizer", context.assets / "tokenizer")
    mine = [tokenizer.decode(group.prompt) for group in trainer.stage._corpora["train_data"].items]
    everyone = trainer.parallel.gather_over_world(mine)
    assert all(texts == everyone[0] for texts in everyone)
    return everyone[0]
