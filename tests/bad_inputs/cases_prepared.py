"""Prepared data that are damaged, unfinished, or made for another stage, tokenizer or length."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable

from bad_inputs.case import UNFINISHED_PREPARATION, UNFINISHED_RUN, BadInput, Maker, Site
from bad_inputs.running import run_here


def _prepared(change: Callable[[Site], object], *flags: str, command: Maker | None = None) -> Maker:
    """Prepares the records of sft as `data`, changes the result, and trains on it."""

    def make(site):
        argv = site.assets.preprocess(str(site.assets.records("sft")), *flags, "--output", "data")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert run_here(argv) == 0
        change(site)
        return site.assets.sft_on("data") if command is None else command(site)

    return make


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Site], object]:
    return lambda site: site.write(name, change((site.folder / name).read_bytes()))


def _info(**changes: object) -> Callable[[Site], object]:
    def change(site):
        told = json.loads((site.folder / "data.json").read_text())
        site.write("data.json", json.dumps(told | changes, indent=1))

    return change


def _flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 0xFF
    return bytes(changed)


def _first_ids(site: Site) -> None:
    """Sets the first token of every document to 65535. All prompts have the same length."""
    told = json.loads((site.folder / "data.json").read_text())
    content, size = bytearray((site.folder / "data.bin").read_bytes()), told["files"][".bin"] // told["counts"]["kept"]
    for document in range(told["counts"]["kept"]):
        content[document * size : document * size + 2] = b"\xff\xff"
    site.write("data.bin", bytes(content))


def _without_rule(site: Site) -> None:
    told = json.loads((site.folder / "data.json").read_text())
    del told["settings"]["multi_turn_loss"]
    site.write("data.json", json.dumps(told, indent=1))


def _nothing(site: Site) -> None:
    pass


def _other_tokenizer(site):
    site.copy(site.assets.tokenizer, "tokenizer")
    site.write("tokenizer/chat_template.jinja", "{{ messages }}")
    return site.assets.sft_on("data", "--tokenizer-model", "tokenizer")


def _unfinished(site):
    (site.folder / "data.parts").mkdir()
    return site.assets.sft_on("data")


def _foreign_parts(plan: str | None) -> Maker:
    def make(site):
        site.write("prepared.parts/000000/data.bin", "1")
        if plan is not None:
            site.write("prepared.parts/plan.json", plan)
        return site.assets.preprocess(str(site.assets.records("sft")))

    return make


_AGAIN = r"copy it again,? or prepare"

CASES = [
    # Damaged.
    BadInput(
        "no list", _prepared(lambda site: (site.folder / "data.json").unlink()), r"without a data.json", r"copy that"
    ),
    BadInput("a cut list", _prepared(_bytes("data.json", lambda b: b[:200])), r"data.json: .* damaged", _AGAIN),
    BadInput(
        "a list that is not UTF-8",
        _prepared(_bytes("data.json", lambda b: b.replace(b"sft", b"\xff"))),
        r"data.json",
        _AGAIN,
    ),
    BadInput(
        "another version", _prepared(_info(format_version=1)), r"data.json: .* format version 1", r"prepare it again"
    ),
    BadInput("counts that are none", _prepared(_info(counts=3)), r"data.json: .* damaged", _AGAIN),
    BadInput("no settings", _prepared(_info(settings={})), r"data.json: .* damaged .*seq_length", _AGAIN),
    BadInput(
        "no file of tokens", _prepared(lambda site: (site.folder / "data.bin").unlink()), r"data.bin is missing", _AGAIN
    ),
    BadInput("cut tokens", _prepared(_bytes("data.bin", lambda b: b[:-4])), r"data.bin has [\d,]+ bytes", _AGAIN),
    BadInput(
        "an index of zeros", _prepared(_bytes("data.idx", lambda b: bytes(len(b)))), r"data.idx is damaged", _AGAIN
    ),
    BadInput("a flipped length", _prepared(_bytes("data.idx", lambda b: _flip(b, 40))), r"data.idx is damaged", _AGAIN),
    BadInput("a flipped count", _prepared(_bytes("data.idx", lambda b: _flip(b, -8))), r"data.idx is damaged", _AGAIN),
    BadInput(
        "fields that are no JSON",
        _prepared(_bytes("data.bin", lambda b: bytes(len(b)))),
        r"data.bin is damaged \(document \d",
        _AGAIN,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "an id that the tokenizer does not have",
        _prepared(_first_ids),
        r"data: document \d is damaged \(it is not what was written, by its checksum\)",
        r"prepare the records again",
        leaves=UNFINISHED_RUN,
    ),
    BadInput("no rule of turns", _prepared(_without_rule), r"data.json is damaged: .* multi_turn_loss", _AGAIN),
    BadInput(
        "a flipped head of arrow",
        _prepared(_bytes("data.arrow", lambda b: bytes(len(b))), "--format", "arrow"),
        r"data.arrow is damaged",
        _AGAIN,
    ),
    BadInput("not finished", _unfinished, r"data: its preparation has not finished", r"run the same .* command again"),
    # Made for something else.
    BadInput(
        "pairs from records of sft",
        _prepared(_nothing, command=lambda site: site.assets.reward_on("data")),
        r"data: prepared with --stage sft",
        r"--stage reward",
    ),
    BadInput(
        "another tokenizer",
        _prepared(_nothing, command=_other_tokenizer),
        r"data: prepared with another tokenizer",
        r"run tools/preprocess_data.py with the --load, --hf-model or --tokenizer-model of the run",
    ),
    BadInput(
        "shorter sequences",
        _prepared(_nothing, command=lambda site: site.assets.sft_on("data", "--seq-length", "32")),
        r"data: prepared with --seq-length 64, the run has --seq-length 32",
        r"run with --seq-length 64, or prepare it again",
    ),
    BadInput(
        "other turns to learn",
        _prepared(_nothing, command=lambda site: site.assets.sft_on("data", "--multi-turn-loss")),
        r"data: prepared with --no-multi-turn-loss",
        r"run with it, or prepare it again",
    ),
    # Preparing again.
    BadInput(
        "prepared data as records",
        _prepared(_nothing, command=lambda site: site.assets.preprocess("data")),
        r"data: is prepared data, not records",
        r"it was made of .*sft.jsonl; give that",
    ),
    BadInput(
        "other records under the same name",
        _prepared(_nothing, command=lambda s: s.assets.preprocess(str(s.assets.records("chats")), "--output", "data")),
        r"data.json is of another preparation: source.input was .*sft.jsonl, is now .*chats.jsonl",
        r"another --output, or remove data.\*",
    ),
    BadInput(
        "parts without a plan",
        _foreign_parts(None),
        r"prepared.parts/plan.json",
        r"remove prepared.parts, or give another --output",
        leaves=UNFINISHED_PREPARATION,
    ),
    BadInput(
        "parts of a plan that is no JSON",
        _foreign_parts("{"),
        r"prepared.parts/plan.json",
        r"remove prepared.parts, or give another --output",
        leaves=UNFINISHED_PREPARATION,
    ),
]
