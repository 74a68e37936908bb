"""README, CONTRIBUTING, docs and notebooks, and the commands in them."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text("utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def commands_in(text: str) -> Iterator[str]:
    """Calls of `qvla`: lines of code blocks (indented or fenced), and code within sentences."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        line, _, _ = line.partition(" #")
        found = re.match(r"(?: {4,})?(?:\$ )?(qvla [a-z].*)", line)
        if found and "`" not in line and (line.startswith("    ") or "--" in line):
            yield found[1].strip()
    for found in re.findall(r"`(qvla [^`]*)`", text.replace("\n", " ")):
        # Others only name a command or an option, or leave something open.
        words = found.split()
        if len(words) > 2 and not words[-1].startswith("--") and not {"COMMAND", "..."} & {*words}:
            yield found


def all_commands() -> list[str]:
    found = [c for page in (*PAGES, *NOTEBOOKS) for c in commands_in(markdown(page))]
    return list(dict.fromkeys(found))


def programs_in(text: str) -> Iterator[str]:
    """Calls of `python`, `pytest` and `make`: what comes behind a `&&` of an installation, too."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.partition(" #")[0] for line in joined.splitlines() if line.startswith("    ")]
    inline = re.findall(
        r"`([^`]*)`", re.sub(r"```.*?```", "", joined, flags=re.DOTALL).replace("\n", " ")
    )
    for line in (*lines, *inline):
        for part in line.split("&&"):
            words = part.strip().removeprefix(".venv/bin/")
            if re.match(r"(python (benchmarks/|-m fuzz)|pytest -?\w|make [a-z])", words):
                yield words


def all_programs(start: str) -> list[str]:
    """Those of all pages that start so, each once."""
    found = [p for page in (*PAGES, *NOTEBOOKS) for p in programs_in(markdown(page))]
    return [program for program in dict.fromkeys(found) if program.startswith(start)]
