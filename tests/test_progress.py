import io

import pytest
from rich.console import Console
from synthetic_runs import Clock

from ocrm_ray.progress import ProgressDisplay, ProgressState, duration_text


def plain(clock: Clock, *moments: tuple[float, ProgressState]) -> list[str]:
    """Lines of a log that is shown states at the given times."""
    output = io.StringIO()
    with ProgressDisplay(Console(file=output, width=40), clock) as display:
        for now, state in moments:
            clock.now = now
            display.update(state)
    return output.getvalue().splitlines()


def rl(done: int, **fields: object) -> ProgressState:
    return ProgressState(stage="rl", done=done, total=140, unit="updates", **fields)


def test_a_log_gets_a_line_when_a_stage_begins_and_ends_and_one_every_ten_seconds() -> None:
    sft = [(float(now), ProgressState(stage="sft", done=now, total=3, unit="epochs")) for now in range(4)]
    steps = [(4.0 + now, rl(now)) for now in range(26)]
    lines = plain(Clock(), *sft, *steps)
    assert [line.split("  ")[0:3] for line in lines] == [
        ["[0:00:00]", "sft", "0/3 epochs"],
        ["[0:00:03]", "sft", "3/3 epochs"],
        ["[0:00:04]", "rl", "0/140 updates"],
        ["[0:00:14]", "rl", "10/140 updates"],
        ["[0:00:24]", "rl", "20/140 updates"],
        ["[0:00:29]", "rl", "25/140 updates"],  # the last state known, when the display closes
    ]


def test_a_line_tells_rate_time_left_and_the_figures_so_far() -> None:
    last = rl(40, proxy=1.234, gold=-3.0, kl=2.5)
    lines = plain(Clock(), (0.0, rl(0)), (10.0, rl(20)), (20.0, last))
    assert lines[-1] == "[0:00:20]  rl  40/140 updates  2 updates/s  50 s left  proxy 1.23  gold -3.00  KL 2.50"


def test_a_stage_that_does_not_count_shows_its_name_alone() -> None:
    assert plain(Clock(), (0.0, ProgressState(stage="start"))) == ["[0:00:00]  start"]


def test_figures_that_are_not_known_are_left_out() -> None:
    assert rl(1, proxy=1.0).figures == "proxy 1.00"
    assert rl(1).figures == ""


def test_a_resumed_stage_is_paced_by_what_was_done_since() -> None:
    lines = plain(Clock(), (100.0, rl(50)), (110.0, rl(55)), (120.0, rl(60)))
    assert lines[0] == "[0:01:40]  rl  50/140 updates"
    assert lines[-1] == "[0:02:00]  rl  60/140 updates  0.5 updates/s  2 min 40 s left"


def test_another_arm_at_the_same_stage_begins_anew() -> None:
    lines = plain(
        Clock(), (0.0, rl(0, arm="none/seed-1")), (1.0, rl(7, arm="none/seed-1")), (2.0, rl(0, arm="ocrm/seed-1"))
    )
    assert [line.split("  ")[1:3] for line in lines] == [
        ["none/seed-1 · rl", "0/140 updates"],
        ["none/seed-1 · rl", "7/140 updates"],
        ["ocrm/seed-1 · rl", "0/140 updates"],
    ]


def test_text_in_brackets_is_no_markup() -> None:
    (line,) = plain(Clock(), (0.0, rl(0, arm="[bold]ocrm[/bold]")))
    assert "[bold]ocrm[/bold]" in line


def test_a_terminal_shows_a_bar_a_stage_and_the_figures() -> None:
    clock, output = Clock(), io.StringIO()
    console = Console(file=output, force_terminal=True, color_system=None, width=140)
    with ProgressDisplay(console, clock) as display:
        display.update(ProgressState(stage="sft"))
        for now, done in ((0.0, 0), (10.0, 20), (20.0, 40)):
            clock.now = now
            display.update(rl(done, arm="[b]ocrm[/b]", proxy=1.5, gold=2.25))
    ended, running = ([line for line in output.getvalue().splitlines() if name in line][-1] for name in ("sft", "rl"))
    assert "00:00" in ended
    for text in ("[b]ocrm[/b] · rl", "40/140 updates", "00:50", "proxy 1.50", "gold 2.25"):
        assert text in running


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.44, "8.4 s"),
        (45.2, "45 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3899, "1 h 04 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_what_a_stage_waits_for_is_shown_behind_its_figures() -> None:
    lines = plain(Clock(), (0.0, rl(0)), (10.0, rl(0, gold=1.0, note="waiting: pool policy")))
    assert lines[-1].endswith("gold 1.00  waiting: pool policy")
