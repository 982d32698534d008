"""A user's mistake is known by its type: what the source may raise, and what it may catch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_brain import errors
from megatron_brain.checkpointing.errors import DamagedError
from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.data.group_schedule import GroupDoesNotFitError
from megatron_brain.data.workers import WorkerKilledError
from megatron_brain.user_functions import UserFunctionError

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("megatron_brain", "tools", "examples") for path in (ROOT / folder).rglob("*.py"))

RAISE_VALUE_ERROR = {"examples/debian_tldr/judge.py": "a judge is a user's own function, which raises what it likes"}

WRAP_OUR_CODE = {
    "examples/reward_server.py": "what is called is the user's own function",
    "megatron_brain/checkpointing/save.py": "an error of the thread that writes is raised where the run waits for it",
    "megatron_brain/checkpointing/storage.py": "raised on all ranks, with the traceback on its own",
    "megatron_brain/config/addresses.py": "what the standard library says of an address; nothing else is called",
    "megatron_brain/conversion/workers.py": "raised on all ranks, and its traceback logged on its own",
    "megatron_brain/data/tables.py": "the rows are read one by one then, where a library's call alone is wrapped",
    "megatron_brain/data/tokenizer/training.py": "SentencePiece, which iterates, cannot pass it on: raised behind it",
    "megatron_brain/generation/vllm/engine.py": "raised again when the job that waits has heard of it",
    "megatron_brain/generation/vllm/folders.py": "raised again behind the half folder that it removes",
    "megatron_brain/generation/vllm/jobs.py": "raised on all ranks that wait for the job",
    "megatron_brain/stages/judging/template.py": "what is called is the user's own template",
    "megatron_brain/user_functions.py": "what is called is the user's own function",
    "tools/benchmarks/trainers.py": "raised in the thread that waits for the other",
}
"""Files with a `try` around calls of our own functions, whose ValueErrors it catches, and why no bug is lost there."""


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_nothing_raises_a_bare_value_error():
    raising = {
        _name(path)
        for path in SOURCES
        for node in ast.walk(_tree(path))
        if isinstance(node, (ast.Raise, ast.Call))
        and isinstance(raised := node.exc if isinstance(node, ast.Raise) else node.func, ast.Name)
        and raised.id == "ValueError"
    }
    assert raising == RAISE_VALUE_ERROR.keys()


def _handlers(tree: ast.Module) -> Iterator[tuple[ast.Try, ast.ExceptHandler]]:
    """Every handler that catches ValueError, by this name, by that of a class above it or by a name for several."""
    wide = {"ValueError", "Exception", "BaseException"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and wide & _names(node.value):
            wide |= _names(*node.targets)
    for node in ast.walk(tree):
        for handler in node.handlers if isinstance(node, ast.Try) else []:
            if handler.type is None or wide & _names(handler.type):
                yield node, handler


def _names(*nodes: ast.AST) -> set[str]:
    return {found.id for node in nodes for found in ast.walk(node) if isinstance(found, ast.Name)}


def test_no_value_error_is_caught_to_be_printed_or_to_end_a_program():
    ends = {"print", "exit", "SystemExit", "_report", "error"}
    for path in SOURCES:
        for _, handler in _handlers(_tree(path)):
            called = {ast.unparse(call.func) for call in ast.walk(handler) if isinstance(call, ast.Call)}
            assert not {name.rpartition(".")[2] for name in called} & ends, f"{_name(path)}:{handler.lineno}"


def _ours(tree: ast.Module) -> set[str]:
    """Names of functions and classes of this package that a module imports or defines."""
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    defined = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {
        *(alias.asname or alias.name for node in imported if "megatron_brain" in node.module for alias in node.names),
        *(node.name for node in defined),
        "self",
    }


def _calls_ours(node: ast.Try, ours: set[str]) -> bool:
    """Whether the body of a `try` calls a function of ours, by its name or as an attribute of something of ours."""
    calls = (call.func for statement in node.body for call in ast.walk(statement) if isinstance(call, ast.Call))
    return any(_first_name(function) in ours for function in calls)


def _first_name(node: ast.expr) -> str | None:
    """`a` of `a` and of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def test_value_errors_are_caught_around_a_librarys_call_alone():
    wrapping = set()
    for path in SOURCES:
        tree = _tree(path)
        ours = _ours(tree)
        if any(_calls_ours(node, ours) for node, _ in _handlers(tree)):
            wrapping.add(_name(path))
    assert wrapping == WRAP_OUR_CODE.keys()


@pytest.mark.parametrize("kind", [DamagedError, GroupDoesNotFitError, UserFunctionError, WorkerKilledError])
def test_what_a_user_can_mend_is_a_user_error(kind):
    assert issubclass(kind, errors.UserError)


def test_a_command_tells_a_users_error_in_one_message_and_lets_every_other_pass(capsys, tmp_path):
    @reports_mistakes
    def main(argv):
        raise argv[0]

    assert main([errors.ConfigError("--flag 3: must be 2")]) == 2
    assert main([PermissionError(13, "Permission denied", "place")]) == 2  # what `files.explained` says of it
    told = capsys.readouterr()
    assert told.err.startswith("error: --flag 3: must be 2\nerror: place: Permission denied: ") and not told.out
    for internal in (ValueError("ours"), AssertionError("ours"), RuntimeError("ours"), OSError("disk")):
        with pytest.raises(type(internal)):
            main([internal])
    assert not capsys.readouterr().err
