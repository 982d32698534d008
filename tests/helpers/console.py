"""The kinds of lines that a stage prints."""

import re

_KINDS = (
    r"(sft|reward|brain|generate|evaluate) with megatron_brain \S+",  # The banner's title, and its rows.
    r"  \S.*",
    r" {4,}\S.*",
    r"",
    r"iteration +\d+/\d+ \| .+ \| \d+:\d\d:\d\d left",
    r"iteration +\d+/\d+( \| validation/\w+ \S+)+",
    r"(INFO|WARNING) megatron_brain\.[\w.]+: .+",
)


def strange_lines(output: str) -> list[str]:
    """The lines of the output that are of none of these kinds."""
    return [line for line in output.splitlines() if not any(re.fullmatch(kind, line) for kind in _KINDS)]
