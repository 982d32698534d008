"""Judges that cannot be loaded, fail on a record, or do not return a number for each response."""

from __future__ import annotations

from bad_inputs.case import BadInput, Maker


def _file(content: str, name: str = "judge.py:score", *flags: str) -> Maker:
    def make(site):
        site.write(name.partition(":")[0], content)
        return site.assets.evaluate("--judge", name, *flags)

    return make


def _named(name: str) -> Maker:
    return lambda site: site.assets.evaluate("--judge", name)


def _returns(value: str) -> Maker:
    """A judge that returns an expression of the responses `y`."""
    return _file(f"def score(x, y, references):\n    return {value}\n")


def _body(*lines: str) -> Maker:
    return _file("\n    ".join(["def score(x, y, references):", *lines]) + "\n")


def _no_reference(site):
    return _file("def score(*columns): return []", "judge.py:score", "--prompts", str(site.assets.records("prompts")))(
        site
    )


_WHICH = r"judge=judge.py:score "
_FORM = r"give path/to/file.py:function"
_FINITE = r"it must be a finite number"
_EACH = r"it must return one number for each response"


def _fails(name: str, maker: Maker, culprit: str, cure: str) -> BadInput:
    """A judge that raises an error. The message quotes its traceback, which shows the user what to mend."""
    return BadInput(name, maker, _WHICH + culprit, cure, has_several_lines=True)


CASES = [
    # Judges that cannot be loaded.
    BadInput("no file", _named("no.py:score"), r"judge=no.py:score: .*no.py is no file", _FORM),
    BadInput("no function named", _named("no.py"), r"judge=no.py: .*no.py is no file", _FORM),
    BadInput("no such function", _file("x = 1\n"), r"judge=judge.py:score: judge.py has no function score", _FORM),
    BadInput("a function that is a number", _file("score = 1\n"), r"judge.py has no function score", _FORM),
    BadInput(
        "no Python file", _file("def score(*c): return 1", "judge.txt:score"), r"judge.txt is no Python file", r"\.py"
    ),
    _fails(
        "a mistake in the syntax",
        _file("def score(:\n"),
        r"raised SyntaxError when it was imported",
        r'judge.py", line 1',
    ),
    _fails(
        "a package that is not there",
        _file("import absent\n"),
        r"raised ModuleNotFoundError",
        r"No module named 'absent'",
    ),
    _fails(
        "an exit", _file("import sys\nsys.exit(0)\n"), r"raised SystemExit when it was imported", r'judge.py", line 2'
    ),
    # Judges that fail.
    _fails(
        "too few arguments",
        _file("def score(x): return x\n"),
        r"raised TypeError on the record \S+:1",
        r"takes 1 positional",
    ),
    _fails(
        "an error on one record",
        _returns("[1 / (' 3:' not in prompt) for prompt in x]"),
        r"raised ZeroDivisionError on the record \S+sft.jsonl:4; its own traceback:",
        r'judge.py", line 2, in score(.|\n)*division by zero',
    ),
    _fails(
        "an error of a generator",
        _body("yield 1", "raise ValueError('late')"),
        r"raised ValueError on the record",
        r"late",
    ),
    _fails("calls of itself", _returns("score(x, y, references)"), r"raised RecursionError", r'judge.py", line 2'),
    BadInput(
        "a record without a reference",
        _no_reference,
        r"judge=.*prompts.jsonl:1 has none",
        r"give the record a completion",
    ),
    # Judges that return something else.
    BadInput("nothing", _returns("None"), _WHICH + r"returned NoneType", _EACH),
    BadInput("a number", _returns("1.0"), _WHICH + r"returned float", _EACH),
    BadInput("a text", _returns("'1' * len(y)"), _WHICH + r"returned str", _EACH),
    BadInput(
        "scores without an order",
        _returns("{i: 1 for i in range(len(y))}"),
        _WHICH + r"returned dict",
        _EACH + r", in order",
    ),
    BadInput("too few", _returns("[1]"), _WHICH + r"returned 1 scores for 8 responses", r"one for each"),
    BadInput("no numbers", _returns("[None] * len(y)"), _WHICH + r"returned None for the response to \S+:1", _FINITE),
    BadInput(
        "numbers as texts", _returns("['1'] * len(y)"), _WHICH + r"returned '1' for the response to \S+:1", _FINITE
    ),
    BadInput(
        "one that is not a number",
        _returns("[1] * (len(y) - 1) + [float('nan')]"),
        _WHICH + r"returned nan .*:8",
        _FINITE,
    ),
    BadInput("one without end", _returns("[10**400] * len(y)"), _WHICH + r"returned 10000", _FINITE),
]
