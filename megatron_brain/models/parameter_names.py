"""Names of parameters that are the same at every pipeline layout."""

from collections.abc import Iterator, Sequence

from torch import nn

from megatron_brain.models.provider import Chunk


def global_parameters(chunks: Sequence[Chunk]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters by name. The name has the layer's number in the whole model, not that in the chunk."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _global_name(chunk, name), parameter


def _global_name(chunk: Chunk, name: str) -> str:
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    local, _, rest = name.removeprefix(prefix).partition(".")
    # megatron-core counts layers from 1.
    return f"{prefix}{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
