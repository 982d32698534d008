"""A user's functions: what is wrong with them is reported as theirs, with their own traceback and the record."""

import signal
import subprocess
import sys

import pytest

from megatron_brain.errors import ConfigError
from megatron_brain.user_functions import ScoringFunction, UserFunctionError

COLUMNS = (["p"] * 5, ["a", "bb", "ccc", "dddd", "eeeee"], ["r"] * 5)
IDS = [f"d.jsonl:{line}" for line in range(1, 6)]


def judge(tmp_path, body, name="score"):
    path = tmp_path / "my_judge.py"
    path.write_text(
        f"import math\n\n\ndef helper(text):\n    return 1 / (len(text) - 3)\n\n\ndef score(p, y, r):\n{body}"
    )
    return ScoringFunction(f"{path}:{name}", "judge")


def test_a_judge_is_a_function_of_a_file_that_returns_a_number_for_each_response(tmp_path):
    assert judge(tmp_path, "    return [len(text) for text in y]")(*COLUMNS, IDS) == [1.0, 2.0, 3.0, 4.0, 5.0]
    numbers = judge(tmp_path, "    import numpy\n    return numpy.arange(5, dtype='float32')")(*COLUMNS, IDS)
    assert numbers == [0.0, 1.0, 2.0, 3.0, 4.0] and all(type(number) is float for number in numbers)


def test_a_judge_that_cannot_be_loaded_is_named_with_what_would_be_right(tmp_path):
    path = tmp_path / "my_judge.py"
    path.write_text("score = 1\n")
    (tmp_path / "judge.txt").write_text("def score(p, y, r): return y\n")
    for name in (f"{tmp_path}/absent.py:score", str(path), "score", str(tmp_path) + ":score"):
        with pytest.raises(ConfigError, match=r"judge=.*give path/to/file.py:function; .* is no file"):
            ScoringFunction(name, "judge")
    for function in ("score", "absent"):
        with pytest.raises(ConfigError, match=f"my_judge.py has no function {function}"):
            ScoringFunction(f"{path}:{function}", "judge")
    with pytest.raises(ConfigError, match="is no Python file"):
        ScoringFunction(f"{tmp_path}/judge.txt:score", "judge")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(:\n", 'raised SyntaxError when it was imported; its own traceback:\n(.|\n)*my_judge.py", line 1'),
        ("import absent_package\n", "raised ModuleNotFoundError when it was imported(.|\n)*line 1, in <module>"),
        ("import sys\nsys.exit(3)\n", "raised SystemExit when it was imported(.|\n)*line 2, in <module>"),
    ],
)
def test_a_file_that_fails_when_it_is_imported_is_the_users(text, message, tmp_path):
    (tmp_path / "my_judge.py").write_text(text)
    with pytest.raises(UserFunctionError, match=message):
        ScoringFunction(f"{tmp_path}/my_judge.py:score", "judge")


def test_an_error_is_told_with_the_record_and_the_users_frames_alone(tmp_path):
    with pytest.raises(UserFunctionError) as raised:
        judge(tmp_path, "    return [helper(text) for text in y]")(*COLUMNS, IDS)
    message = str(raised.value)
    assert "my_judge.py:score raised ZeroDivisionError on the record d.jsonl:3; its own traceback:" in message
    assert "line 5, in helper" in message and message.endswith("ZeroDivisionError: division by zero")
    assert "user_functions.py" not in message
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_an_error_that_no_record_makes_alone_names_the_records_that_make_it_together(tmp_path):
    body = "    if 'bb' in y and 'dddd' in y:\n        raise KeyError('both')\n    return [0] * len(y)"
    with pytest.raises(UserFunctionError, match="raised KeyError on the records d.jsonl:1 to d.jsonl:5 together"):
        judge(tmp_path, body)(*COLUMNS, IDS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return [0.0, 1.0, math.nan, 0.0, 0.0]", "nan for the response to d.jsonl:3; it must be a finite"),
        ("    return [0.0, 1.0, 2.0, math.inf, 0.0]", "returned inf for the response to d.jsonl:4"),
        ("    return [0.0, None, 2.0, 3.0, 0.0]", "returned None for the response to d.jsonl:2"),
        ("    return [0.0, 1.0, 2.0, 3.0, '4.0']", "returned '4.0' for the response to d.jsonl:5"),
        ("    return [0.0, 1.0]", "returned 2 scores for 5 responses"),
        ("    return None", "returned NoneType; it must return one number for each response"),
        ("    return 1.0", "returned float; it must return one number for each response"),
    ],
)
def test_scores_that_are_no_finite_numbers_stop_with_the_record(body, message, tmp_path):
    with pytest.raises(UserFunctionError, match=message):
        judge(tmp_path, body)(*COLUMNS, IDS)


def test_a_file_is_imported_as_python_imports_a_script(tmp_path):
    """Dataclasses with postponed annotations, functions for a pool of processes, and a file beside it."""
    (tmp_path / "my_rules.py").write_text("def points(text):\n    return len(text)\n")
    path = tmp_path / "pooled_judge.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from dataclasses import dataclass\n"
        "import my_rules\n\n"
        "@dataclass\nclass Answer:\n    text: str\n\n"
        "def one(text):\n    return my_rules.points(Answer(text).text)\n\n"
        "def score(p, y, r):\n"
        "    with ProcessPoolExecutor(1) as pool:\n"
        "        return list(pool.map(one, y))\n"
    )
    assert ScoringFunction(f"{path}:score", "judge")(*COLUMNS, IDS) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_file_stands_in_for_no_package_of_its_name(tmp_path):
    import numpy

    for name in ("numpy", "json"):
        (tmp_path / f"{name}.py").write_text("def score(p, y, r):\n    return [1] * len(y)\n")
        assert ScoringFunction(f"{tmp_path}/{name}.py:score", "judge")(*COLUMNS, IDS) == [1.0] * 5
    import json

    assert json.loads("1") == 1 and sys.modules["numpy"] is numpy


ASYNC = """
import asyncio

async def score(p, y, r):
    return await asyncio.gather(*(one(text) for text in y))

async def one(text):
    await asyncio.sleep(0.001 * (9 - len(text)))
    return 1 / (len(text) - 3)

def returns_an_awaitable(p, y, r):
    return score(p, ["longer"] * len(y), r)
"""


def function_of(tmp_path, text, name="score", seconds=None):
    path = tmp_path / "rule.py"
    path.write_text(text)
    timeout = None if seconds is None else (seconds, "--reward-timeout")
    return ScoringFunction(f"{path}:{name}", "reward_function", timeout=timeout)


def test_a_coroutine_function_is_awaited_and_its_errors_name_the_record(tmp_path):
    assert function_of(tmp_path, ASYNC, "returns_an_awaitable")(*COLUMNS, IDS) == [1 / 3] * 5
    with pytest.raises(UserFunctionError, match="raised ZeroDivisionError on the record d.jsonl:3(.|\n)*in one"):
        function_of(tmp_path, ASYNC)(*COLUMNS, IDS)


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
        "\n        try:\n            while True: pass\n        except Exception: return [0.0] * len(y)",
    ],
)
def test_a_function_that_hangs_is_interrupted_where_it_is_and_the_records_are_named(body, tmp_path):
    text = f"def score(p, y, r):\n    return stuck(y)\n\ndef stuck(y):\n    if True:\n        {body}\n"
    with pytest.raises(UserFunctionError) as raised:
        function_of(tmp_path, text, seconds=0.1)(*COLUMNS, IDS)
    message = str(raised.value)
    assert "did not score the 5 responses to the records d.jsonl:1 to d.jsonl:5 within --reward-timeout 0.1" in message
    assert message.count("rule.py") >= 3 and "in stuck" in message and "user_functions.py" not in message


def test_a_coroutine_that_waits_forever_ends_too(tmp_path):
    text = "import asyncio\nasync def score(p, y, r):\n    await asyncio.sleep(60)\n"
    with pytest.raises(UserFunctionError, match="within --reward-timeout 0.1 seconds"):
        function_of(tmp_path, text, seconds=0.1)(*COLUMNS, IDS)


def test_the_limit_holds_while_a_failing_record_is_looked_for_and_nothing_of_it_stays(tmp_path):
    text = "import time\ndef score(p, y, r):\n    time.sleep(0.03 if len(y) == 5 else 60)\n    raise ValueError\n"
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserFunctionError, match="within --reward-timeout 0.1 seconds"):
        function_of(tmp_path, text, seconds=0.1)(*COLUMNS, IDS)
    assert function_of(tmp_path, "def score(p, y, r): return [1] * len(y)", seconds=0.05)(*COLUMNS, IDS) == [1.0] * 5
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_function_that_never_returns_to_python_ends_the_process_and_shows_where_it_is(tmp_path):
    path = tmp_path / "rule.py"
    path.write_text("import signal\ndef score(p, y, r):\n    signal.pthread_sigmask(0, [14])\n    while True: pass\n")
    code = "from megatron_brain import user_functions as u\nu._GRACE = 0.2\n"
    code += f"u.ScoringFunction('{path}:score', 'f', timeout=(0.1, 't'))(['p'], ['y'], [{{}}], ['i'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and 'rule.py", line 4 in score' in done.stderr and "Timeout" in done.stderr


def test_a_function_that_changes_what_it_gets_changes_nothing_for_others(tmp_path):
    records = [{"answer": "bb", "tests": [1]}] * 5
    text = "def score(p, y, r):\n    p.clear()\n    return [(x == q.pop('answer')) + len(q['tests'])"
    text += " for x, q in zip(y, r)]\n"
    assert function_of(tmp_path, text)(COLUMNS[0], COLUMNS[1], records, IDS) == [1.0, 2.0, 1.0, 1.0, 1.0]
    assert records == [{"answer": "bb", "tests": [1]}] * 5
