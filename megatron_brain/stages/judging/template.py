"""The message that asks a language model to compare two answers."""

from pathlib import Path

import jinja2
import jinja2.meta
import jinja2.sandbox

from megatron_brain.errors import ConfigError

_DEFAULT = Path(__file__).with_name("default.jinja")
_FIELDS = ("prompt", "answer_a", "answer_b")


class JudgeTemplate:
    """A Jinja template of the fields `prompt`, `answer_a` and `answer_b`, each of which it must use.

    Args:
        path: the file; None: the template of the package.

    Attributes:
        source: the text of the file.

    Raises:
        ConfigError: there is no such file, or it is no template of exactly these fields, or cannot be rendered.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        try:
            self.source = Path(path or _DEFAULT).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"judge_template={path}: cannot be read as UTF-8 text ({error})") from error
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        try:
            parsed = environment.parse(self.source)
            self._template = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"judge_template={path}:{error.lineno}: is no Jinja template: {error.message}") from error
        used = jinja2.meta.find_undeclared_variables(parsed) - environment.globals.keys()
        if used != set(_FIELDS):
            wrong = ", ".join(sorted(used ^ set(_FIELDS)))
            raise ConfigError(
                f"judge_template={path}: must use {', '.join(_FIELDS)} and no other field; wrong or missing: {wrong}"
            )
        self.message("A question?", "An answer.", "Another answer.")

    def message(self, prompt: str, answer_a: str, answer_b: str) -> str:
        """The text for the judge.

        Raises:
            ConfigError: the template cannot be rendered with these texts.
        """
        try:
            return self._template.render(prompt=prompt, answer_a=answer_a, answer_b=answer_b)
        except Exception as error:  # A template is code, which may raise anything.
            raise ConfigError(
                f"judge_template={self._path}: cannot be rendered ({type(error).__name__}: {error}); correct the file"
            ) from error
