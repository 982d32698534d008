"""What a stage prints, by the kinds of its lines."""

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
    """Lines that are of no kind that we print."""
    return [line for line in output.splitlines() if not any(re.fullmatch(kind, line) for kind in _KINDS)]
