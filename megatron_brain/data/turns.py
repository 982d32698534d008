"""Finds every turn of the assistant in the text of a chat, and makes ids of the chat with a mask for the loss.

A turn begins where sampling begins it: after the messages before it and the template's generation prompt. It ends
where the next message begins. There are two ways to find it:

- *Growing conversations*, with any template. Two texts must begin the text of the whole conversation: the text of the
  messages so far with the generation prompt, and the text of these messages with the answer. The turn is what the
  second text adds to the first.
- *Marks*: what the template wraps in ``{% generation %} ... {% endgeneration %}``. They are used where there are any,
  and must agree with the first way wherever that is exact. Where a template opens a turn for sampling in another way
  than it writes this turn, what is marked is learned, and a warning says so.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any
from weakref import WeakKeyDictionary

from megatron_brain.data.chat import Chat, Span
from megatron_brain.data.conversations import weight_of
from megatron_brain.data.last_turn import require_answer, require_begins, require_closed
from megatron_brain.data.omissions import require_written, shape_of
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.errors import RecordError, short

logger = logging.getLogger(__name__)

_MARK_CURE = (
    "wrap what the assistant writes, its end-of-turn token included, in {% generation %} ... {% endgeneration %} "
    "in the chat template (--chat-template FILE), or train on the last turn only (without --multi-turn-loss)"
)
_KIND = "unmarked assistant turns"
_AGREED: WeakKeyDictionary[Tokenizer, set[tuple[Any, ...]]] = WeakKeyDictionary()
"""Shapes of conversations for which a tokenizer's marks were found to agree with growing conversations."""


def encode_all_turns(chat: Chat) -> tuple[list[int], list[int], list[bool]]:
    """A conversation as ids for a loss on every assistant turn whose `weight` is not 0.

    Returns:
        prompt ids (up to the first assistant token), response ids (the rest, ending with EOS), and for each
        response token whether it is learned.

    Raises:
        RecordError: the turns cannot be found, the template leaves out some of what is learned, or nothing is learned.
    """
    require_answer(chat)
    text, turns = locate_turns(chat)
    require_closed(chat)
    learned = {index: span for index, span in turns.items() if weight_of(chat.messages[index])}
    if not learned:
        raise RecordError(
            chat.where,
            "nothing to learn",
            "every assistant message has weight 0: nothing is learned; remove the record",
        )
    require_written(chat, text, learned, count=len(chat.messages))
    tokenizer = chat.tokenizer
    # Each piece is tokenised by itself, as in sampling: no token crosses the beginning of a turn.
    cuts = [0, *chain.from_iterable(turns.values()), len(text)]
    prompt, *pieces, tail = tokenizer.encode_pieces([text[a:b] for a, b in pairwise(cuts)])
    if any(rest[:1] == [tokenizer.eos_id] for rest in pieces[1::2]) or _ends_unmarked(tokenizer, tail):
        raise _not_marked(chat, "leaves the end-of-turn token unmarked")
    mask: list[bool] = []
    special = tokenizer.special_ids
    for place, piece in enumerate(pieces):
        is_learned = place % 2 == 0 and list(turns)[place // 2] in learned
        length = tokenizer.turn_length(piece) if is_learned else 0
        if is_learned and place < len(pieces) - 2 and piece[length - 1 : length] and piece[length - 1] not in special:
            _warn_of_turns_without_end()
        mask += [True] * length + [False] * (len(piece) - length)
    response = tokenizer.close_turn(list(chain.from_iterable(pieces)))
    return prompt, response, [*mask[: len(response) - 1], list(turns)[-1] in learned]


def locate_turns(chat: Chat) -> tuple[str, dict[int, Span]]:
    """The text of a conversation, and the spans of the assistant's messages in it, by their places in the chat.

    Raises:
        RecordError: the messages cannot be found, or the template's marks are wrong.
    """
    indices = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if indices[0] == 0:
        raise RecordError(chat.where, "bad messages", "the conversation has nothing before the assistant's first turn")
    if not chat.tokenizer.marks_turns(chat.tools):
        text = chat.closed(len(chat.messages))
        return text, _grown(chat, text, indices)
    text, marks = chat.marked()
    turns = _marked(chat, text, indices, marks)
    # Both ways are compared only once for each shape, as growing conversations cost one rendering per turn.
    known, shape = _AGREED.setdefault(chat.tokenizer, set()), shape_of(chat, len(chat.messages))
    if shape in known:
        return text, turns
    try:
        grown = _grown(chat, text, indices)
    except RecordError:
        grown = turns  # The text of a turn depends on what follows it, so there is nothing to compare with.
    for index in indices:
        _require_same(chat, text, index, turns[index], grown[index])
    known.add(shape)
    return text, turns


def _grown(chat: Chat, text: str, indices: Sequence[int]) -> dict[int, Span]:
    """The turns, found from the texts of growing conversations."""
    turns: dict[int, Span] = {}
    opening, end = _generation_prompt(chat, indices[0]), 0
    for index in indices:
        prompt = chat.opened(index)
        require_begins(chat, prompt, text, f"the assistant's turn messages[{index}]")
        start = len(prompt)
        if start < end:
            raise _differs(chat, index, text[start:end], "")
        if opening.strip() and text.startswith(opening, start):
            raise RecordError(
                chat.where,
                _KIND,
                f"the chat template writes {short(opening)}, the generation prompt of other turns, inside of the "
                f"assistant's turn messages[{index}], so sampling would begin elsewhere; use a template that opens "
                "every turn alike (--chat-template FILE), or train on the last turn only (without --multi-turn-loss)",
            )
        end = len(text) if index == len(chat.messages) - 1 else _end_of_turn(chat, text, index, start)
        turns[index] = Span(start, end)
    return turns


def _generation_prompt(chat: Chat, count: int) -> str:
    """What the template adds to the first `count` messages to open an assistant turn."""
    prompt = chat.opened(count)
    return prompt[len(os.path.commonprefix([prompt, chat.closed(count)])) :]


def _end_of_turn(chat: Chat, text: str, index: int, start: int) -> int:
    """Where a turn ends that is not the last.

    A template may close a conversation in another way than a turn: by EOS after it, or by another token instead of the
    one that ends a turn. So special tokens and white space at the very end may differ.
    """
    alone = chat.closed(index + 1)
    if len(alone) >= start and text.startswith(alone):
        return len(alone)
    special = chat.tokenizer.special_texts
    end = start + len(_without_closing(alone[start:], special))
    if end < start or not text.startswith(alone[:end]):
        raise _differs(chat, index, alone, text)
    has_ended, place = False, end
    for token in _closing_tokens(alone[end:], special):
        if not text.startswith(token, place):
            break
        place += len(token)
        has_ended |= token in special
    if has_ended or not alone[end:].strip():
        return place
    other = next(_closing_tokens(text[end:].lstrip(), special), "")
    if other not in special:
        raise _differs(chat, index, alone, text)
    return text.index(other, end) + len(other)


def _without_closing(text: str, special: Collection[str]) -> str:
    """A text without the special tokens and the white space at its end."""
    while True:
        text = text.rstrip()
        found = next((each for each in special if text.endswith(each)), None)
        if found is None:
            return text
        text = text.removesuffix(found)


def _closing_tokens(text: str, special: Collection[str]) -> Iterator[str]:
    """The special tokens and runs of white space at the beginning of a text, one by one."""
    alternatives = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    token = re.compile(rf"{alternatives}|\s+" if special else r"\s+")
    place = 0
    while match := token.match(text, place):
        yield match[0]
        place = match.end()


def _differs(chat: Chat, index: int, alone: str, text: str) -> RecordError:
    same = len(os.path.commonprefix([alone, text]))
    return RecordError(
        chat.where,
        _KIND,
        f"the chat template writes the assistant's turn messages[{index}] otherwise once the conversation goes on: "
        f"...{short(alone[same:])} at its end and ...{short(text[same:])} inside, so its tokens cannot be told; "
        f"{_MARK_CURE}",
    )


def _marked(chat: Chat, text: str, indices: Sequence[int], marks: Sequence[Span]) -> dict[int, Span]:
    """The turns, found from the template's marks, which may begin inside the generation prompt."""
    spans = _merge_adjoining(marks)
    if len(spans) != len(indices):
        raise _not_marked(chat, f"marks {len(spans)} of {len(indices)} assistant turns")
    opening = _generation_prompt(chat, indices[0])
    return {
        index: Span(_begin_of_turn(chat, text, index, span, opening), span.end)
        for index, span in zip(indices, spans, strict=True)
    }


def _begin_of_turn(chat: Chat, text: str, index: int, span: Span, opening: str) -> int:
    """Where sampling begins a turn. The turn's marks must contain this place.

    Args:
        opening: the generation prompt.
    """
    prompt = chat.opened(index)
    if text.startswith(prompt):
        begin, earliest = len(prompt), len(os.path.commonprefix([prompt, chat.closed(index)]))
    else:
        # The template writes earlier turns differently now. The generation prompt, or at least its header, is the same.
        found = _end_of_opening(text, span, opening)
        if found is None and (header := _header(chat, opening)) and _end_of_opening(text, span, header) is not None:
            _warn_of_other_opening(opening, header)
            return span.start
        if found is None:
            raise _not_marked(
                chat, f"does not mark every turn from the end of its generation prompt on, {short(opening)}"
            )
        begin, earliest = found, found - len(opening)
    turn = f"the assistant's turn messages[{index}]"
    if span.start > begin:
        raise _not_marked(chat, f"leaves the beginning of {turn} unmarked, {short(text[begin : span.start])}")
    if span.start < earliest:
        raise _not_marked(chat, f"marks what precedes {turn}, {short(text[span.start : earliest])}")
    return begin


def _end_of_opening(text: str, span: Span, opening: str) -> int | None:
    """Where the generation prompt ends: inside a turn's marks or right before them; None if it is not there."""
    ends = range(span.start, span.start + len(opening) + 1)
    return next((end for end in ends if text.endswith(opening, 0, end)), None)


def _header(chat: Chat, opening: str) -> str:
    """The beginning that the generation prompt shares with every turn: the assistant's name, but no ``<think>``."""
    question = {"role": "user", "content": "question"}
    try:
        written = chat.render([question, {"role": "assistant", "content": "answer"}], add_generation_prompt=False)
        asked = chat.render([question], add_generation_prompt=False)
    except RecordError:
        return ""
    header = os.path.commonprefix([opening, written[len(os.path.commonprefix([written, asked])) :]])
    return header if header.strip() else ""


@functools.cache
def _warn_of_other_opening(opening: str, header: str) -> None:
    """Warn once for each opening."""
    logger.warning(
        "the chat template opens a turn for sampling with %s but begins some turns that it marks with %s alone: they "
        "are learned as they are marked, and sampling begins otherwise than they do; where the template has a switch, "
        "set it in the records ('chat_template_kwargs': {'enable_thinking': false}), or edit its generation prompt "
        "(--chat-template FILE)",
        short(opening),
        short(header),
    )


@functools.cache
def _warn_of_turns_without_end() -> None:
    """Warn once."""
    logger.warning(
        "the chat template ends no turn but the last one with a special token: of a turn in the middle, its end is not "
        "learned; for a model that must stop there too, give a template that writes an end-of-turn token behind each "
        "(--chat-template FILE)"
    )


def _merge_adjoining(blocks: Sequence[Span]) -> list[Span]:
    """The marked spans. A turn may be written by several blocks that adjoin, which become one span."""
    spans: list[Span] = []
    for start, end in blocks:
        if spans and spans[-1].end == start:
            spans[-1] = Span(spans[-1].start, end)
        elif start < end:
            spans.append(Span(start, end))
    return spans


def _require_same(chat: Chat, text: str, index: int, marked: Span, grown: Span) -> None:
    """Raise where marks and growing conversations disagree on the end of a turn by more than white space.

    After the last turn may stand the text that closes the conversation. No mark contains it.
    """
    is_last, special = index == len(chat.messages) - 1, chat.tokenizer.special_texts
    ours, theirs = (
        _without_closing(turn, special) if is_last else turn.rstrip()
        for turn in (text[span.start : span.end] for span in (marked, grown))
    )
    if ours == theirs:
        return
    turn = f"the assistant's turn messages[{index}]"
    if theirs.startswith(ours):
        raise _not_marked(
            chat, f"leaves the end-of-turn token unmarked, or more: {short(theirs[len(ours) :])} of {turn}"
        )
    raise _not_marked(chat, f"marks what follows {turn}: {short(ours[len(theirs) :])}")


def _not_marked(chat: Chat, state: str) -> RecordError:
    return RecordError(chat.where, _KIND, f"the chat template {state}; {_MARK_CURE}")


def _ends_unmarked(tokenizer: Tokenizer, tail: Sequence[int]) -> bool:
    """Whether anything follows what the template marks, other than white space and EOS at the very end."""
    if tail[-1:] == [tokenizer.eos_id]:
        tail = tail[:-1]
    return not all(map(tokenizer.is_space, tail))
