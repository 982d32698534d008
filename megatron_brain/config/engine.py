"""Settings of the engine that draws responses."""

from dataclasses import dataclass
from typing import Literal

from megatron_brain.config.addresses import require_address
from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class EngineConfig:
    """Which engine draws responses: our own sampler, or vLLM servers."""

    engine: Literal["native", "vllm"] = "native"
    """Draw with our own sampler (native), or with `vllm serve` processes over HTTP (vllm)."""

    engine_url: str | None = None
    """Addresses of the vLLM servers, as http://host:port, with commas between them."""

    engine_sync_dir: str | None = None
    """Folder that trainer and servers share; each hand-over of weights makes a folder in it, and the last two stay."""

    engine_concurrency: int = 256
    """Requests under way to one server at one time, over all data-parallel replicas."""

    engine_request_timeout: float = 300.0
    """Longest wait for the answer to one request, in seconds; then the request is sent again."""

    engine_timeout: float = 900.0
    """Longest wait for a response or a hand-over of weights with all repetitions, in seconds; then the run stops."""

    max_engine_difference: float = 0.1
    """Largest mean difference between a server's and the trainer's log-probs of a probe, in nats per token."""

    def __post_init__(self) -> None:
        for name in ("engine_concurrency", "engine_request_timeout", "engine_timeout", "max_engine_difference"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"{name}={value}: must be positive")
        if self.engine_timeout < self.engine_request_timeout:
            raise ConfigError(
                f"engine_timeout={self.engine_timeout} is less than engine_request_timeout="
                f"{self.engine_request_timeout}: it includes the repetitions of a request, so give a larger one"
            )
        needed = {"engine_url": self.engine_url, "engine_sync_dir": self.engine_sync_dir}
        for name, given in needed.items():
            if self.engine == "vllm" and given is None:
                raise ConfigError(f"{name} is not set: engine=vllm needs it; give --{name.replace('_', '-')}")
            if self.engine == "native" and given is not None:
                raise ConfigError(f"{name}={given}: engine=native does not read it; add --engine vllm, or drop it")
        for url in self.urls:
            require_address("engine_url", url, example="http://host:port")
        if len(set(self.urls)) != len(self.urls):
            raise ConfigError(f"engine_url={self.engine_url}: a server is named twice; name each once")

    @property
    def urls(self) -> list[str]:
        """The addresses of the servers, without a slash at the end."""
        return [] if self.engine_url is None else [url.strip().rstrip("/") for url in self.engine_url.split(",")]
