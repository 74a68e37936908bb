"""Progress is drawn on terminals only."""

from qvla_jax.progress import ProgressBars, track


def test_track_reports_every_item_after_it_was_used():
    calls = []
    for item in track("ab", 2, "stage", lambda *a: calls.append(a)):
        calls.append(item)
    assert calls == [("stage", 0, 2), "a", ("stage", 1, 2), "b", ("stage", 2, 2)]


def test_bars_are_quiet_when_stderr_is_no_terminal(capsys):
    with ProgressBars() as progress:
        progress("stage", 1, 2)
        progress("stage", 2, 2)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_bars_show_stage_and_count(capsys):
    with ProgressBars(enabled=True) as progress:
        progress("sensitivity", 1, 4)
        progress("sensitivity", 4, 4)
    captured = capsys.readouterr()
    assert "sensitivity" in captured.err
    assert "4/4" in captured.err
    assert captured.out == ""
