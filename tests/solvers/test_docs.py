import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "solvers.md"


def test_the_examples_of_the_documentation_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(examples) == 2
    names: dict[str, object] = {}
    for example in examples:  # the second goes on where the first ends
        exec(compile(example, str(DOCUMENT), "exec"), names)
    assert names["solution"].details["price"] >= 0
