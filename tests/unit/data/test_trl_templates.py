"""The training templates that TRL brings, read from the installed package: with their marks and without them.

Their vocabularies are not here, so their special tokens are read out of their texts and given to a tiny tokenizer.
"""

import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest
import trl
from helpers.conversations import without_marks
from helpers.tiny_tokenizers import write_hf_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_brain.data.chat import Chat
from megatron_brain.data.conversations import check_messages, check_template_kwargs
from megatron_brain.data.json_values import without_nulls
from megatron_brain.data.last_turn import render_last_turn
from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.data.tools import check_tools
from megatron_brain.data.turns import encode_all_turns
from megatron_brain.errors import RecordError

TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*_training.jinja"))
SPECIAL = re.compile(
    r"<[|｜][^<>\s{}'\"]{1,40}?[|｜]>|</?(?:start_of_turn|end_of_turn|turn\|?|s|eos|bos)>"
    r"|<\|?(?:turn|tool_call|tool_response|channel)\|?>|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]"
)
QUESTION, SECOND = ({"role": "user", "content": text} for text in ("What time is it in Ulm?", "And in Bonn?"))
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "time of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "name"}}},
    },
}
CALL = {"type": "function", "id": "abcdefgh1", "function": {"name": "get_time", "arguments": {"city": "Ulm"}}}


def say(text, **fields):
    return {"role": "assistant", "content": text, **fields}


CONVERSATION = [QUESTION, say("It is nine."), SECOND, say("It is ten.")]
THOUGHT_OVER = "<think>\nThe other clock says ten.\n</think>\n\nIt is ten."
VARIANTS = {
    "plain": {"messages": CONVERSATION},
    "without thinking": {"messages": CONVERSATION, "chat_template_kwargs": {"enable_thinking": False}},
    "thoughts in a field": {
        "messages": [
            QUESTION,
            say("It is nine.", reasoning_content="The clock says nine."),
            SECOND,
            say("It is ten.", reasoning_content="The other clock says ten."),
        ]
    },
    "thoughts in the text": {
        "messages": [
            QUESTION,
            say(THOUGHT_OVER.replace("ten", "nine").replace("other ", "")),
            SECOND,
            say(THOUGHT_OVER),
        ]
    },
    "one thought": {"messages": [QUESTION, say(THOUGHT_OVER)]},
    "tools": {
        "messages": [
            QUESTION,
            say("", tool_calls=[CALL]),
            {"role": "tool", "name": "get_time", "tool_call_id": "abcdefgh1", "content": "09:15"},
            say("It is 09:15."),
            {"role": "user", "content": "thanks"},
            say("You are welcome."),
        ],
        "tools": [TOOL],
    },
    "a call at the end": {"messages": [QUESTION, say("", tool_calls=[CALL])], "tools": [TOOL]},
}

# They go through the parts of a content, and write nothing of a text.
MULTIMODAL = {"idefics3_training", "llava_next_training", "smolvlm_training"}
# The marks leave out what ends a call, which a model must write itself: refused, not trained without.
UNMARKED = {("diffusion_gemma_training", "a call at the end")}


def tokenizers_of(path, folder):
    """With marks, and without."""
    text = path.read_text()
    assert "generation" in text and without_marks(text) != text
    special = list(dict.fromkeys(["<unk>", "<s>", "</s>", "<pad>", *sorted(set(SPECIAL.findall(text)))]))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return [
        HuggingFaceTokenizer(write_hf_tokenizer(folder / tag, special=special, chat_template=template, **names))
        for tag, template in (("marked", text), ("plain", without_marks(text)))
    ]


def outcome(function, tokenizer, record):
    chat = Chat(
        tokenizer,
        check_messages(record["messages"], "messages", "x"),
        "x",
        check_tools(record, "x"),
        check_template_kwargs(record, "x"),
    )
    try:
        return function(chat)
    except RecordError as error:
        return str(error)


def require_learns_what_is_marked(tokenizer, found, record, *, as_parts):
    """transformers tells the marks too; of each we learn what follows the generation prompt, and its end."""
    messages = without_nulls(check_messages(record["messages"], "messages", "x"))
    if as_parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    kwargs = {**record.get("chat_template_kwargs", {}), **tokenizer.hf.special_tokens_map}
    [text], [marks] = render_jinja_template(
        [messages],
        tools=record.get("tools"),
        chat_template=tokenizer.hf.chat_template,
        return_assistant_tokens_mask=True,
        **kwargs,
    )
    theirs = [text[a:b] for a, b in merged(marks)]
    _, response, mask = found
    runs = [list(run) for learned, run in groupby(zip(response, mask, strict=True), key=itemgetter(1)) if learned]
    ours = [tokenizer.hf.decode([i for i, _ in run]) for run in runs]
    assert len(ours) == len(theirs)
    for learned, marked in zip(ours, theirs, strict=True):
        words = learned.removesuffix(tokenizer.hf.eos_token).strip()
        assert words and marked.removesuffix(tokenizer.hf.eos_token).strip().endswith(words)


def merged(marks):
    spans = []
    for start, end in marks:
        if spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], end
        elif start < end:
            spans.append((start, end))
    return spans


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_marks_and_growing_conversations_tell_the_same_turns(path, tmp_path):
    marked, plain = tokenizers_of(path, tmp_path)
    assert marked.marks_turns() and not plain.marks_turns()
    taken = []
    for name, record in VARIANTS.items():
        by_marks, by_growing = (outcome(encode_all_turns, tokenizer, record) for tokenizer in (marked, plain))
        if (path.stem, name) in UNMARKED:
            assert "leaves the end-of-turn token unmarked" in by_marks and not isinstance(by_growing, str)
        elif isinstance(by_marks, str):
            assert isinstance(by_growing, str), (name, by_marks)
            assert re.search(r"chat template (refuses|leaves|writes|renders|does not mark|marks)", by_marks), by_marks
        else:
            taken.append(name)
            if isinstance(by_growing, str):  # The generation prompt is not what this turn begins with.
                assert "cannot be cut out" in by_growing, (name, by_growing)
            else:
                assert by_growing == by_marks, name
            require_learns_what_is_marked(marked, by_marks, record, as_parts=path.stem in MULTIMODAL)
        last_turns = [outcome(render_last_turn, tokenizer, record) for tokenizer in (marked, plain)]
        assert last_turns[0] == last_turns[1], name
    assert taken, "a training template takes some conversation"
    written = "<tool" in path.read_text() or "tools" in path.read_text()
    assert written or "tools" not in taken
