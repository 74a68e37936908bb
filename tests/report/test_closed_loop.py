"""The report's section on closed-loop episodes."""

import base64
import dataclasses
import re

import pytest

from qvla_jax.report import closed_loop, render
from qvla_jax.report.closed_loop import choose_rollouts, closed_loop_section

from .fakes import fake_map, fake_report


@pytest.fixture
def videos(tmp_path):
    for name in ("00_success_00", "01_failure_03", "01_success_00"):
        (tmp_path / f"libero-mini_libero_spatial_{name}.mp4").write_bytes(name.encode())
    return tmp_path


def test_success_and_paired_difference_are_those_of_the_summary(closed_loop_summary):
    page = closed_loop_section(closed_loop_summary)
    assert "18 of 20" in page
    assert "15 of 20" in page
    assert "-15.0 points" in page  # (1 - 4) / 20
    assert ">0.375<" in page  # binomial test of 1 in 5: 2 (1 + 5) / 32
    assert ">0.3<" in page


def test_a_single_policy_has_nothing_to_compare(closed_loop_summary):
    first = closed_loop_summary.policies[:1]
    summary = dataclasses.replace(closed_loop_summary, policies=first, comparisons=())
    page = closed_loop_section(summary)
    assert "18 of 20" in page
    assert "points" not in page


def test_failures_come_first_and_say_what_they_show(videos, closed_loop_summary):
    rollouts = choose_rollouts(videos, closed_loop_summary)
    assert [r.path.stem[-13:] for r in rollouts] == [
        "01_failure_03", "00_success_00", "01_success_00",
    ]  # fmt: skip
    assert rollouts[0].caption == "libero-mini, failure: task 1 of two (initial state 3)"


def test_videos_are_part_of_the_page(videos, closed_loop_summary):
    report = dataclasses.replace(fake_report(), closed_loop=closed_loop_summary)
    rollouts = choose_rollouts(videos, closed_loop_summary)
    page = render(report, fake_map(), rollouts=rollouts)
    found = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert [base64.b64decode(text).decode() for text in found] == [
        "01_failure_03", "00_success_00", "01_success_00",
    ]  # fmt: skip


def test_videos_that_would_make_the_page_too_large_are_left_out(videos, closed_loop_summary):
    for task in range(2, 4):
        path = videos / f"libero-mini_libero_spatial_{task:02d}_failure_00.mp4"
        path.write_bytes(bytes(4 * 2**20))
    page = closed_loop_section(closed_loop_summary, choose_rollouts(videos, closed_loop_summary))
    assert page.count("<video") == 2


def test_no_folder_has_no_videos(closed_loop_summary, tmp_path):
    assert choose_rollouts(tmp_path / "videos", closed_loop_summary) == []


def test_intervals_show_no_signed_zero_and_policies_have_colours_of_their_own():
    assert [closed_loop._whole(share) for share in (-0.001, 0.001, -0.07, 0.05)] == [
        "0", "0", "-7", "+5",
    ]  # fmt: skip
    assert len({closed_loop._colour(place) for place in range(10)}) == 10
