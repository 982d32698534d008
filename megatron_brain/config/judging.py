"""Settings of the language model that compares answers."""

import dataclasses
from dataclasses import dataclass

from megatron_brain.config.addresses import require_address
from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class JudgingConfig:
    """A language model that compares answers two by two, over an OpenAI-compatible endpoint."""

    judge_url: str | None = None
    """Base address such as https://host/v1 of chat completions that compare answers; OPENAI_API_KEY is its key."""

    judge_model: str | None = None
    """Name of the model at --judge-url."""

    judge_template: str | None = None
    """Jinja file that makes the judge's message of prompt, answer_a and answer_b; unset: that of the package."""

    judge_max_tokens: int = 16
    """Longest reply of the judge, in tokens; raise it for a --judge-template that asks for reasons."""

    judge_max_verdicts: int = 2000
    """Largest number of verdicts that the report uses; the first prompts are compared. A prompt needs two or four."""

    judge_concurrency: int = 8
    """Requests that are under way to --judge-url at one time."""

    judge_timeout: float = 3600.0
    """Longest wait for all verdicts with all repetitions, in seconds; those that came are kept."""

    judge_cache: str | None = None
    """File that keeps every verdict, and from which they are used again; unset: --output with .verdicts.jsonl added."""

    def __post_init__(self) -> None:
        for name in ("judge_max_tokens", "judge_max_verdicts", "judge_concurrency", "judge_timeout"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"{name}={value}: must be positive")
        if self.judge_url is None:
            for field in dataclasses.fields(self):
                if (value := getattr(self, field.name)) != field.default:
                    raise ConfigError(
                        f"{field.name}={value}: nothing reads it without --judge-url; give that, or drop it"
                    )
            return
        if "@" in self.judge_url or "?" in self.judge_url:
            raise ConfigError(
                "judge_url: must hold no name, password or key, because settings are written to files; give the key in "
                "the environment variable OPENAI_API_KEY"
            )
        require_address("judge_url", self.judge_url, example="http://host:port/v1")
        if self.judge_model is None:
            raise ConfigError("judge_model is not set: --judge-url needs it; give --judge-model")
