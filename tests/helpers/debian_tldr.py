"""Invented packages, and functions that run the example's scripts on them."""

import json
import random
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "debian_tldr"


def words(count: int, seed: object) -> str:
    """A nonsense text of `count` words, the same for the same `seed`."""
    rng = random.Random(str(seed))
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(count))


def stanza(name: str, synopsis: str, *paragraphs: str) -> str:
    body = "\n .\n".join(f" {paragraph}" for paragraph in paragraphs)
    return f"Package: {name}\nDescription-md5: 0\nDescription-en: {synopsis}\n{body}\n"


def origin_stanza(name: str, source: str | None = None, section: str = "utils") -> str:
    return (
        f"Package: {name}\n" + (f"Source: {source}\n" if source else "") + f"Section: {section}\nPriority: optional\n"
    )


def package(example, name: str, synopsis: str = "a tool for words", *paragraphs: str, **fields):
    fields = {"source": name, "section": "utils"} | fields
    paragraphs = paragraphs or (words(30, name),)
    return example.descriptions.Package(name=name, synopsis=synopsis, paragraphs=paragraphs, **fields)


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(module, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
