"""A record is the same in every spelling and from every source: nulls, empty lists, JSON as text, tables."""

import copy
import gzip
import json
import math
from datetime import datetime
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.conversations import THINKING, conversations
from helpers.reading import reading_settings
from helpers.tiny_tokenizers import write_hf_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_brain.config.data import DataConfig
from megatron_brain.data.conversations import check_messages, check_template_kwargs
from megatron_brain.data.corpus import read_corpus
from megatron_brain.data.prepared.preparation import Preparation, prepare
from megatron_brain.data.records import PreferenceReader, PromptReader, SFTReader, read_records
from megatron_brain.data.sources import load_records
from megatron_brain.data.tokenizer import HuggingFaceTokenizer
from megatron_brain.data.tools import check_tools
from megatron_brain.errors import RecordError

LIMITS = DataConfig(seq_length=4096)
USER = {"role": "user", "content": "what time is it?"}
ANSWER = {"role": "assistant", "content": "nine"}
ARGUMENTS = {"city": "Ulm", "count": 2}


def call(arguments, **more):
    return {"role": "assistant", **more, "tool_calls": [{"function": {"name": "get_time", "arguments": arguments}}]}


def part(kind):
    return {
        "role": "assistant",
        "content": [{"type": kind, "text": "the clock shows 9"}, {"type": "text", "text": "nine"}],
    }


def tool(name="get_time", **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


@pytest.fixture(scope="session")
def thinking_dir(tmp_path_factory):
    names = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": THINKING}
    return write_hf_tokenizer(tmp_path_factory.mktemp("thinking"), **names)


@pytest.fixture(scope="session")
def thinking(thinking_dir):
    return HuggingFaceTokenizer(thinking_dir)


def ids(tokenizer, record, **options):
    """What sft trains on, or the error without its place."""
    try:
        [group], _ = read_records(SFTReader(tokenizer, LIMITS, **options), [("x:1", record)])
    except RecordError as error:
        return error.message
    return group.prompt, group.responses, group.loss_masks


@st.composite
def respelled(draw, value, *, depth=0):
    """The same JSON value with nulls in its objects, as Arrow fills what a row lacks."""
    if isinstance(value, list):
        return [draw(respelled(member, depth=depth + 1)) for member in value]
    if not isinstance(value, dict):
        return value
    filled = {key: draw(respelled(member, depth=depth + 1)) for key, member in value.items()}
    for key in draw(st.lists(st.sampled_from(["city", "title", "enum", "name", "items"]), max_size=2)):
        filled.setdefault(key, None)
    return filled


@settings(max_examples=150, deadline=None)
@given(record=conversations(), data=st.data(), multi_turn_loss=st.booleans())
def test_nulls_and_empty_lists_change_nothing_at_any_depth(thinking, record, data, multi_turn_loss):
    expected = ids(thinking, record, multi_turn_loss=multi_turn_loss)
    other = data.draw(respelled(record))
    other.setdefault("tools", data.draw(st.sampled_from([None, [], "", "[]", "null"])))
    for message in other["messages"]:
        message.setdefault("tool_calls", data.draw(st.sampled_from([None, [], "", "[]"])))
        message.setdefault("weight", None)
        message.setdefault("reasoning_content", None)
    assert ids(thinking, other, multi_turn_loss=multi_turn_loss) == expected


def as_text(value):
    return json.dumps(value, ensure_ascii=False)


@settings(max_examples=150, deadline=None)
@given(
    record=conversations(),
    spelling=st.sets(st.sampled_from(["tools", "tool", "calls", "call", "arguments", "messages"])),
)
def test_json_as_text_is_what_it_says(thinking, record, spelling):
    expected = ids(thinking, record)
    other = copy.deepcopy(record)
    for message in other["messages"]:
        for each in message.get("tool_calls", []):
            if "arguments" in spelling:
                each["function"]["arguments"] = as_text(each["function"]["arguments"])
        if "call" in spelling and "tool_calls" in message:
            message["tool_calls"] = [as_text(each) for each in message["tool_calls"]]
        if "calls" in spelling and "tool_calls" in message:
            message["tool_calls"] = as_text(message["tool_calls"])
    if "tool" in spelling and "tools" in other:
        other["tools"] = [as_text(each) for each in other["tools"]]
    if "tools" in spelling and "tools" in other:
        other["tools"] = as_text(other["tools"])
    if "messages" in spelling:
        other["messages"] = as_text(other["messages"])
    assert ids(thinking, other) == expected
    if not isinstance(expected, str):
        assert '\\"' not in thinking.hf.decode(expected[1][0]) or '\\"' in as_text(record)


def write_sources(folder, rows):
    """The rows in every kind of file; a table has every field of any row."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(lines)
    (folder / "array.json").write_text(json.dumps(rows, indent=1))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (
        pyarrow.OSFile(str(folder / "a.jsonl.zst"), "wb") as file,
        pyarrow.CompressedOutputStream(file, "zstd") as packed,
    ):
        packed.write(lines.encode())
    table = pyarrow.Table.from_struct_array(pyarrow.array(rows))
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    with pyarrow.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_file(str(folder / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    columns = {name: None for row in rows for name in row}  # from_list looks at the first row alone
    data = datasets.Dataset.from_list([columns | row for row in rows], on_mixed_types="use_json")
    data.save_to_disk(folder / "saved")
    data.to_parquet(folder / "json.parquet")
    return sorted(path for path in folder.iterdir())


ROWS = [
    {"messages": [USER, call({"city": "Ulm"}, content="")], "tools": [tool(city={"type": "string"})]},
    {"messages": [USER, {**ANSWER, "weight": 1}]},
    {
        "messages": [USER, {"role": "assistant", "reasoning_content": "why", **call({"item": "bread", "count": 2})}],
        "tools": [tool("get_price", item={"type": "string", "title": "what"}), tool(city={"type": "string"})],
    },
    {"messages": [{"role": "system", "content": "be kind"}, USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
    {"prompt": "plain", "completion": " text"},
]


@pytest.mark.parametrize("multi_turn_loss", [False, True])
def test_a_record_has_the_same_ids_from_every_source(thinking, thinking_dir, tmp_path, multi_turn_loss):
    reader = SFTReader(thinking, LIMITS, multi_turn_loss=multi_turn_loss)
    expected, _ = read_records(reader, [(f"x:{i}", row) for i, row in enumerate(ROWS)])
    contents = [(group.prompt, group.responses, group.loss_masks) for group in expected]
    places = write_sources(tmp_path, ROWS)
    assert len(places) == 9
    for place in places:
        groups, _ = read_records(reader, load_records(str(place)))
        assert [(group.prompt, group.responses, group.loss_masks) for group in groups] == contents, place
    reading = reading_settings(
        stage="sft",
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=thinking_dir,
        limits=LIMITS,
        multi_turn_loss=multi_turn_loss,
    )
    raw = read_corpus(str(tmp_path / "a.jsonl"), reader).contents
    for source in ("a.parquet", "saved"):
        prefix = str(tmp_path / "prepared" / f"{source}{multi_turn_loss}")
        prepare(Preparation(input=str(tmp_path / source), split=None, prefix=prefix, format="indexed", reading=reading))
        corpus = read_corpus(prefix, reader)
        assert [(group.prompt, group.responses, group.loss_masks) for group in corpus.items] == contents
        assert corpus.contents == raw, "and the same fingerprint"


def test_json_and_maps_of_arrow_are_objects(thinking, tmp_path):
    rows = [{"messages": [USER, call(ARGUMENTS, content="")], "tools": [tool(city={"type": "string"})]}]
    expected = ids(thinking, rows[0])
    as_json, words = datasets.List(datasets.Json()), datasets.Value("string")
    message = {"role": words, "content": words, "tool_calls": as_json}
    features = datasets.Features({"messages": datasets.List(message), "tools": as_json})
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(tmp_path / "json.parquet")
    data.save_to_disk(tmp_path / "saved")
    assert "arrow.json" in str(pyarrow.parquet.read_schema(tmp_path / "json.parquet"))
    for source in (tmp_path / "json.parquet", tmp_path / "saved", *(tmp_path / "saved").glob("*.arrow")):
        assert ids(thinking, load_records(str(source))[0][1]) == expected, source
    text = pyarrow.string()
    function = pyarrow.struct({"name": text, "arguments": pyarrow.map_(text, text)})
    message = pyarrow.struct(
        {"role": text, "content": text, "tool_calls": pyarrow.list_(pyarrow.struct({"function": function}))}
    )
    mapped = [USER, call({"city": "Ulm"}, content="")]
    column = pyarrow.array([mapped], pyarrow.list_(message))
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "map.parquet")
    assert ids(thinking, load_records(str(tmp_path / "map.parquet"))[0][1]) == ids(thinking, {"messages": mapped})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [USER, call("{'city': 'Ulm'}")],
            r"tool_calls\[0\].function.arguments must be an object, and is a text that is no",
        ),
        ([USER, call("[1]")], r"arguments must be an object, and is the JSON text of \[1\]"),
        ([USER, call('"{}"')], r"arguments must be an object, and is the JSON text of '{}'"),
        ([USER, call(3)], "arguments must be an object, or the JSON text of one, not 3"),
        ([USER, call('{"a": "\\ud83d"}')], "is half of a character"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "has no text 'name'"),
        (
            [USER, {"role": "assistant", "tool_calls": ["get_time()"]}],
            r"tool_calls\[0\] must be an object, and is a text",
        ),
        ([USER, {"role": "assistant", "tool_calls": {"name": "f"}}], "'tool_calls' must be a list of objects"),
        ("who is it?", "'messages' must be a list, and is a text that is no JSON"),
        ('{"role": "user"}', "'messages' must be a list, and is the JSON text of"),
        ([USER, {**ANSWER, "weight": 0.5}], r"messages\[1\] \(assistant\) has weight 0.5; only 0 and 1"),
        ([USER, {**ANSWER, "weight": "0"}], "has weight '0'; only 0 and 1"),
        ([{**USER, "weight": 1}, ANSWER], r"messages\[0\] \(user\) has weight 1, and only what the assistant says"),
        ([USER, {**ANSWER, "train": False}], "has 'train', which is not supported: give 'weight': 0 or 1"),
        ([USER, {**ANSWER, "loss_mask": [1]}], "has 'loss_mask', which is not supported"),
        (
            [USER, {**ANSWER, "function_call": {"name": "f"}}],
            "has 'function_call', which is not supported: give it in 'tool",
        ),
        ([USER, {**ANSWER, "reasoning_content": ["a"]}], "'reasoning_content' must be a text"),
        (
            [{**USER, "tools": [tool()]}, ANSWER],
            r"messages\[0\] \(user\) has 'tools', .* give it as the record's 'tools'",
        ),
        ([{**USER, "functions": "[{}]"}, ANSWER], "has 'functions', .* give it as the record's 'tools'"),
        ([USER, {**ANSWER, "reasoning_details": [{"text": "why"}]}], "give the text as 'reasoning_content'"),
        ([USER, part("thinking")], r"content\[0\] is of type 'thinking', .* give it as 'reasoning_content'"),
        ([USER, part("reasoning_text")], "is of type 'reasoning_text', .* give it as 'reasoning_content'"),
        ([USER, part("tool_use")], "is of type 'tool_use', which is not supported: only texts are read"),
        ([USER, part("image_url")], "is of type 'image_url', which is not supported: only texts are read"),
        ([USER, {"role": "assistant", "content": ["nine"]}], r"content\[0\] must be {'type': 'text'"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], r"content\[0\] must be {'type': 'text'"),
        (
            [USER, call({"when": datetime(2024, 1, 1)})],
            r"arguments.when is a datetime, .* dates of texts that look like",
        ),
        ([USER, call({"a": [{"b": Decimal(1)}]})], r"arguments.a\[0\].b is a Decimal, which JSON has no word for"),
        ([USER, call({"a": b"x"})], "arguments.a is a bytes"),
        ([USER, call({"low": math.nan})], "arguments.low is nan, which JSON has no word for"),
        ([USER, call('{"low": -Infinity}')], "arguments.low is -inf"),
        ([USER, call('{"low": 1e400}')], "arguments.low is inf"),
    ],
)
def test_a_message_that_cannot_be_what_was_meant_is_refused_with_its_field(messages, message):
    with pytest.raises(RecordError, match=f"d.jsonl:3: .*{message}"):
        check_messages(messages, "messages", "d.jsonl:3")


@pytest.mark.parametrize("spelling", ["", " ", "{}", {}, None, "null"])
def test_a_call_without_arguments_has_none_however_it_is_spelled(spelling):
    [_, message] = check_messages([USER, call(spelling)], "messages", "x")
    assert message["tool_calls"][0]["function"]["arguments"] == {}
    without = {"role": "assistant", "tool_calls": [{"function": {"name": "get_time"}}]}
    assert check_messages([USER, without], "messages", "x")[1] == message


@pytest.mark.parametrize("spelling", ["text", "input_text", "output_text", None])
def test_parts_of_a_content_that_are_texts_are_joined(spelling):
    parts = [{"type": spelling, "text": "ni"}, {"text": "ne"}]
    assert check_messages([USER, {**ANSWER, "content": parts}], "messages", "x")[1] == ANSWER


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_call_without_a_text_is_the_same_however_it_is_spelled(content):
    bare = {key: value for key, value in call(ARGUMENTS).items() if key != "content"}
    assert check_messages([USER, {**bare, **content}], "messages", "x")[1] == bare


def test_what_is_no_json_in_tools_and_switches_is_refused_with_its_path():
    broken = tool(city={"default": datetime(2024, 1, 1)})
    with pytest.raises(RecordError, match=r"x:1: tools\[0\].function.parameters.properties.city.default is a datetime"):
        check_tools({"tools": [broken]}, "x:1")
    with pytest.raises(RecordError, match="x:1: chat_template_kwargs.budget is nan"):
        check_template_kwargs({"chat_template_kwargs": {"budget": math.nan}}, "x:1")
    # What no template is given is nobody's business.
    messages = [{**USER, "created": datetime(2024, 1, 1)}, {**ANSWER, "score": math.nan}]
    assert len(check_messages(messages, "messages", "x:1")) == 2


def test_fields_that_are_empty_are_not_there():
    empty = {"function_call": {"name": None, "arguments": None}, "tools": [], "functions": "", "reasoning_details": []}
    assert check_messages([{**USER, **empty}, ANSWER], "messages", "x")[0]["content"] == USER["content"]
    told = {"reasoning": "why", "reasoning_details": [{"text": "why"}]}
    assert check_messages([USER, {**ANSWER, **told}], "messages", "x")[1]["reasoning"] == "why"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (5, "field 'tools' must be a list of objects, not 5"),
        ({"name": "f"}, "field 'tools' must be a list of objects"),
        ("get_time", "field 'tools' must be a list, and is a text that is no JSON"),
        ([None], r"tools\[0\] must be an object, not None"),
        (["f"], r"tools\[0\] must be an object, and is a text that is no JSON"),
        ([{"function": {"name": "f", "parameters": "x"}}], r"tools\[0\].function.parameters must be an object"),
        (
            [{"function": {"name": "f", "parameters": []}}],
            r"tools\[0\].function.parameters must be an object, not \[\]",
        ),
    ],
)
def test_tools_that_are_no_list_of_objects_are_refused_with_their_place(tools, message):
    with pytest.raises(RecordError, match=f"d.jsonl:3: .*{message}"):
        check_tools({"tools": tools}, "d.jsonl:3")


def test_an_empty_object_of_a_tool_stays_while_a_null_goes():
    tools = [
        {"function": {"name": "f", "parameters": {"properties": {}, "required": [], "title": None, "enum": [None]}}}
    ]
    assert check_tools({"tools": tools}, "x") == [
        {"function": {"name": "f", "parameters": {"properties": {}, "required": [], "enum": [None]}}}
    ]


def test_switches_of_the_template_come_with_the_record(tmp_path):
    template = THINKING.replace(
        "assistant\n{% endif %}", "assistant\n{% if quiet %}<quiet>{% endif %}{% endif %}"
    ).replace("{% generation %}", "{% if quiet %}<quiet>{% endif %}{% generation %}")
    tokenizer = HuggingFaceTokenizer(write_hf_tokenizer(tmp_path, eos_token="<|im_end|>", chat_template=template))
    for kwargs in ({"quiet": True}, '{"quiet": true}'):
        prompt, _, _ = ids(tokenizer, {"messages": [USER, ANSWER], "chat_template_kwargs": kwargs})
        assert tokenizer.hf.decode(prompt).endswith("<quiet>")
    for kwargs in ({}, None, ""):
        assert "<quiet>" not in tokenizer.hf.decode(
            ids(tokenizer, {"messages": [USER, ANSWER], "chat_template_kwargs": kwargs})[0]
        )
    for kwargs, message in (([1], "must be an object"), ({"tools": []}, "sets 'tools', which is no setting")):
        with pytest.raises(RecordError, match=f"x:1: field 'chat_template_kwargs' {message}"):
            check_template_kwargs({"chat_template_kwargs": kwargs}, "x:1")


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("images", ["a.png"], "only texts are read"),
        ("weight", 0.5, "all records count alike"),
        ("weight", 0, "all records count alike"),
        ("loss_mask", [0, 1], "'weight': 0 or 1 and --multi-turn-loss"),
        ("functions", [{"name": "f"}], "give the functions as 'tools'"),
        ("system", "be kind", "as the first message, with the role system"),
    ],
)
def test_a_field_that_would_change_what_is_learned_is_refused_by_name(thinking, field, value, cure):
    record = {"messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "ten"}]}
    for reader in (SFTReader(thinking, LIMITS), PreferenceReader(thinking, LIMITS), PromptReader(thinking, LIMITS)):
        with pytest.raises(RecordError, match=f"x:1: field '{field}' is not supported: .*{cure}"):
            reader.draft("x:1", {**record, field: value})
        for nothing in (None, [], "") if field != "weight" else (None, 1, 1.0):
            reader.draft("x:1", {**record, field: nothing})


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "False", "0", "no"])
def test_a_completion_that_people_disliked_is_not_learned(thinking, label):
    record = {"prompt": "a", "completion": " b"}
    with pytest.raises(RecordError, match="x:1: field 'label' is .*unpaired preferences"):
        SFTReader(thinking, LIMITS).draft("x:1", {**record, "label": label})


@pytest.mark.parametrize("label", [True, 1, "true", "spam", 2, None])
def test_a_label_that_says_something_else_is_no_hindrance(thinking, label):
    record = {"prompt": "a", "completion": " b"}
    assert ids(thinking, {**record, "label": label}) == ids(thinking, record)


@pytest.mark.parametrize("field", ["prompt", "completion"])
@pytest.mark.parametrize(
    "spelled",
    [json.dumps([USER]), json.dumps([USER], indent=2), str([USER]), json.dumps(USER), f" {[USER, ANSWER]}",
     str([{"content": "a", "role": "user"}]), str([USER, ANSWER]).replace("}, {", "}\n {"),
     json.dumps([{"id": 1, **USER}]), json.dumps([{"thinking": None, **ANSWER}]), json.dumps({"messages": [USER]}),
     json.dumps([{"from": "human", "value": "a"}]), json.dumps(json.dumps([USER]))],
)  # fmt: skip
def test_messages_written_as_a_text_are_no_prompt(thinking, field, spelled):
    record = {"prompt": "a", "completion": "b", field: spelled}
    with pytest.raises(RecordError, match=f"field '{field}' is the text of messages: give the list itself"):
        SFTReader(thinking, LIMITS).draft("x:1", record)


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1}] is JSON', '{"role": "engineer", "place": "Ulm"}', 'say {"role": "user", "content": "a"}', "[user]: a",
     f"{json.dumps([USER])} What does this say?", json.dumps({"log": [USER]}), '"role": "user" is a field'],
)  # fmt: skip
def test_other_json_is_a_text_like_any(thinking, text):
    assert not isinstance(ids(thinking, {"prompt": text, "completion": text}), str)


@pytest.mark.parametrize(("field", "value"), [("system", "be kind"), ("tools", [tool()])])
def test_what_has_no_place_beside_texts_is_refused(thinking, field, value):
    texts = {"prompt": "a", "completion": " b", "chosen": " b", "rejected": " c"}
    for reader in (SFTReader(thinking, LIMITS), PreferenceReader(thinking, LIMITS), PromptReader(thinking, LIMITS)):
        with pytest.raises(RecordError, match=f"x:1: field '{field}' is not supported: .*give messages"):
            reader.draft("x:1", {**texts, field: value})
        reader.draft("x:1", {**texts, field: type(value)()})
    as_text = {"messages": json.dumps([USER, ANSWER]), "tools": [tool()]}
    assert ids(thinking, as_text) == ids(thinking, {**as_text, "messages": [USER, ANSWER]})


def test_documents_that_a_template_would_write_are_not_left_out(thinking, tmp_path):
    writes = "{% for d in documents or [] %}{{ d.text }}\n{% endfor %}" + THINKING
    tokenizer = HuggingFaceTokenizer(write_hf_tokenizer(tmp_path, eos_token="<|im_end|>", chat_template=writes))
    record = {"messages": [USER, ANSWER]}
    documents = [{"title": "t", "text": "the clock"}]
    with pytest.raises(RecordError, match="x:1: field 'documents' would be written .*'chat_template_kwargs'"):
        SFTReader(tokenizer, LIMITS).draft("x:1", {**record, "documents": documents})
    prompt, _, _ = ids(tokenizer, {**record, "chat_template_kwargs": {"documents": documents}})
    assert tokenizer.decode(prompt).startswith("the clock")
    assert ids(thinking, {**record, "documents": documents}) == ids(thinking, record)


def test_a_last_message_that_only_calls_a_tool_is_an_answer_in_every_stage(thinking):
    messages = [USER, call(ARGUMENTS)]
    [sft], _ = read_records(SFTReader(thinking, LIMITS), [("x:1", {"messages": messages})])
    other = [USER, ANSWER]
    pair = {"chosen": messages, "rejected": other}
    [preference], _ = read_records(PreferenceReader(thinking, LIMITS), [("x:1", pair)])
    for record in ({"messages": messages}, {"prompt": [USER], "completion": messages[1:]}, pair):
        [prompt], _ = read_records(PromptReader(thinking, LIMITS), [("x:1", record)])
        assert prompt.tokens == sft.prompt == preference.group.prompt
        assert prompt.reference == '<call>{"name": "get_time", "arguments": {"city": "Ulm", "count": 2}}</call>'
    assert sft.responses[0] == preference.group.responses[0] != preference.group.responses[1]


@pytest.mark.parametrize("name", ["parameters", "input", "args", "kwargs"])
def test_a_call_whose_arguments_have_another_name_does_not_lose_them(thinking, name):
    for function in ({"name": "f", name: {"city": "Ulm"}}, {"name": "f", "arguments": None, name: '{"city": "Ulm"}'}):
        for calls in ([function], [{"type": "function", "function": function}]):
            messages = [USER, {"role": "assistant", "tool_calls": calls}]
            with pytest.raises(RecordError, match=rf"tool_calls\[0\].* no 'arguments', and '{name}' is given: rename"):
                SFTReader(thinking, LIMITS).draft("x:1", {"messages": messages})
    nothing = [USER, {"role": "assistant", "tool_calls": [{"name": "f", name: {}}]}]
    assert ids(thinking, {"messages": nothing}) == ids(thinking, {"messages": [USER, called("f", {})]})


def called(name, arguments):
    return {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}


def test_arguments_beside_the_function_are_not_lost(thinking):
    messages = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "arguments": {"a": 1}}]}]
    with pytest.raises(RecordError, match=r"tool_calls\[0\].function has no 'arguments', and 'arguments' is given"):
        SFTReader(thinking, LIMITS).draft("x:1", {"messages": messages})


@pytest.mark.parametrize("name", ["image", "images", "audio", "videos"])
def test_what_is_no_text_in_a_message_is_refused_by_name(thinking, name):
    with pytest.raises(RecordError, match=rf"messages\[0\] \(user\) has '{name}', which is not supported: only texts"):
        SFTReader(thinking, LIMITS).draft("x:1", {"messages": [{**USER, name: ["a.png"]}, ANSWER]})
    assert ids(thinking, {"messages": [{**USER, name: []}, ANSWER]}) == ids(thinking, {"messages": [USER, ANSWER]})


@pytest.mark.parametrize("nothing", ["[]", "null", " ", "{}"])
def test_no_tools_as_json_text_are_none(thinking, nothing):
    texts = {"prompt": "a", "completion": " b"}
    assert ids(thinking, {**texts, "tools": nothing}) == ids(thinking, texts)
    chat = {"messages": [USER, ANSWER]}
    assert ids(thinking, {"messages": [{**USER, "tools": nothing}, ANSWER]}) == ids(thinking, chat)


@pytest.mark.parametrize("key", ["parameters", "input_schema", "inputSchema"])
def test_schemas_are_objects_at_every_depth(key):
    city = {"type": "string", "enum": ["Ulm"]}
    schema = {"type": "object", "properties": {"city": city, "at": {"items": city}}, "required": ["city"]}
    as_text = {
        **schema,
        "properties": json.dumps({"city": json.dumps(city), "at": {"items": json.dumps(city)}}),
        "required": json.dumps(["city"]),
    }
    wanted = [{"name": "f", key: schema}]
    for spelled in (
        as_text,
        json.dumps(as_text),
        {**schema, "properties": {**schema["properties"], "city": json.dumps(city)}},
    ):
        assert check_tools({"tools": [{"name": "f", key: spelled}]}, "x:1") == wanted
    with pytest.raises(RecordError, match=rf"tools\[0\].{key}.properties must be an object, and is a text that is no"):
        check_tools({"tools": [{"name": "f", key: {"properties": "city: string"}}]}, "x:1")


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json"])
def test_what_is_nested_too_deeply_is_named(kind, thinking, tmp_path):
    deep = "[" * 700 + "]" * 700
    fine = '{"prompt": "a", "completion": "b"}'
    (tmp_path / kind).write_text(f'{fine}\n{fine[:-1]}, "x": {deep}}}\n')
    with pytest.raises(RecordError, match=rf"{kind}:2: is nested too deeply"):
        read_corpus(str(tmp_path / kind), SFTReader(thinking, LIMITS))
