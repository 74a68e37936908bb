"""Every `qvla` command of the pages runs, in the order of its page, in a reader's folder."""

from typing import Any

import pytest

from .pages import NOTEBOOKS, PAGES, ROOT, commands_in, markdown
from .running import SIMULATOR, done

# TensorFlow and Beam warn about their own dependencies.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]


def pages() -> list[Any]:
    """The pages that have commands, those with `--sim` left out where there is no simulator."""
    found = []
    for page in (*PAGES, *NOTEBOOKS):
        commands = [c for c in commands_in(markdown(page)) if SIMULATOR or "--sim " not in c]
        if commands:
            found.append(
                pytest.param(list(dict.fromkeys(commands)), id=str(page.relative_to(ROOT)))
            )
    return found


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("commands", pages())
def test_commands_of_a_page_run(commands):
    for command in commands:
        done(command)
