"""Reads the report of --dry-run."""

import re


def read_report(text: str) -> dict[str, dict[str, str] | str]:
    """Returns {section: {name: value}}. A section that is a list becomes one text."""
    sections: dict[str, dict[str, str] | str] = {}
    for block in re.sub(r"\n {3,}", " ", text).strip().split("\n\n"):  # Long values take several lines.
        title, *lines = block.splitlines()
        if any(line.startswith("  - ") for line in lines):
            sections[title] = " ".join(line.strip() for line in lines)
        else:
            sections[title] = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in lines)
    return sections
