"""Each finding of the long run again, and a short run. `make fuzz` runs a million cases."""

from pathlib import Path

import pytest

from .harness import check, fuzz, limits
from .targets import targets

FINDINGS = Path(__file__).parent / "findings"
# Half a second each.
CASES = 300


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}


def test_damaged_files_end_in_one_error(readers):
    for target in readers.values():
        result = fuzz(target, max(4, int(CASES * min(target.weight, 1.0))))
        assert not result.findings, f"{target.name}: {result.findings[0]}"
        assert result.kinds > 0
        assert result.accepted < result.cases


@pytest.mark.parametrize(
    "path", sorted(FINDINGS.glob("*/*")), ids=lambda p: f"{p.parent.name}-{p.name}"
)
def test_findings_stay_mended(readers, path):
    target = readers[path.parent.name]
    content = path.read_bytes()
    target.read(target.seeds[0])  # imports count for no file
    with limits():
        ended, finding = check(target, content, trace=True)
    assert finding is None, finding
    assert ended
