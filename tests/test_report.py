import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from synthetic_runs import Clock, Shape, read_lines, write_run

from ocrm_ray.errors import UserError
from ocrm_ray.metrics import RunLog
from ocrm_ray.plots import draw_run
from ocrm_ray.report import figure_text, render_report, write_report
from ocrm_ray.run_files import correction_windows, read_jsonl, read_run

PICTURES = {"rewards", "policy", "reward_model", "corrections", "times"}
TIMES = ((1, 2.0), (2, 1.0), (3, 9.0))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "full", Shape())
    write_report(run_dir)
    return run_dir


def page_of(run_dir: Path) -> str:
    """The page without its pictures, which take most of the time."""
    return render_report(read_run(run_dir), set())


def line_of(run_dir: Path, picture: str, axes: int, line: int) -> tuple[list[float], list[float]]:
    """(x, y) of a drawn line."""
    drawn = draw_run(read_run(run_dir))[picture].axes[axes].get_lines()[line]
    return list(drawn.get_xdata()), list(drawn.get_ydata())


def events(run_dir: Path, *rows: dict[str, object]) -> None:
    (run_dir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps(run_dir: Path, *rows: dict[str, object]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_shows_the_numbers_of_the_files(full_run: Path) -> None:
    page = (full_run / "report.html").read_text(encoding="utf-8")
    summary = json.loads((full_run / "summary.json").read_text())
    for key in set(summary) - {"steps", "wall_s"}:
        assert f"{summary[key]:.3f}" in page, key
    assert "Finished: 140 policy updates." in page
    promoted = [row for row in read_lines(full_run / "events.jsonl") if row["event"] == "promoted"]
    assert f"{len(promoted)} of {len(promoted) + 1}" in page
    for row in promoted:
        for shown in (f"{row['ess_fraction']:.4f}", row["lag_steps"], row["num_rollouts_finished"]):
            assert f'<td class="number">{shown}</td>' in page
    assert "algorithm: rloo" in page


def test_every_picture_of_the_page_is_there_and_shows_something(full_run: Path) -> None:
    page = (full_run / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert {Path(source).stem for source in sources} == PICTURES
    for source in sources:
        pixels = imread(full_run / source)[..., :3]
        assert pixels.std() > 0.05, source
        assert len(np.unique(pixels @ np.array([1.0, 1e3, 1e6]))) > 50, source  # many distinct colours


def test_the_reward_curves_are_the_evaluations_of_the_file(full_run: Path) -> None:
    rows = [row for row in read_lines(full_run / "metrics.jsonl") if row["proxy_mean"] is not None]
    assert len(rows) == 15
    at = [row["step"] for row in rows]
    assert line_of(full_run, "rewards", 0, 0) == (at, [row["gold_mean"] for row in rows])
    assert line_of(full_run, "rewards", 2, 0) == (at, [row["proxy_mean"] for row in rows])
    root_kl, gold = line_of(full_run, "rewards", 1, 0)
    np.testing.assert_allclose(np.square(root_kl), [row["eval_kl_sft"] for row in rows], atol=1e-12)
    assert gold == [row["gold_mean"] for row in rows]


def test_accuracy_ess_idle_and_stage_lines_are_those_of_the_files(full_run: Path) -> None:
    rows = read_lines(full_run / "metrics.jsonl")
    evaluated = [row for row in rows if row["proxy_mean"] is not None]
    updates = [row for row in rows if row["step_s"] is not None]
    accuracy = line_of(full_run, "reward_model", 0, 0)[1]
    np.testing.assert_allclose(accuracy, [100 * row["rm_accuracy"] for row in evaluated])
    weighted = [row for row in read_lines(full_run / "events.jsonl") if row["event"] == "ratios_scored"]
    for line, key in enumerate(("ess_fraction", "max_weight_share")):
        at, share = line_of(full_run, "reward_model", 3, line)
        assert at == [row["snapshot_version"] for row in weighted]
        np.testing.assert_allclose(share, [100 * row[key] for row in weighted])
    for line, key in enumerate(("log_weight_std", "length_correlation")):
        drawn = line_of(full_run, "reward_model", 4, line)
        assert drawn == ([row["snapshot_version"] for row in weighted], [row[key] for row in weighted])
    train, idle = line_of(full_run, "times", 0, 4), line_of(full_run, "times", 1, 6)
    assert train == ([row["step"] for row in updates], [row["stage_s"]["train"] for row in updates])
    np.testing.assert_allclose(idle[1], [100 * row["idle_share"]["reward"] for row in updates])


MEASURED = [
    ("policy", 0, ["eval_kl_sft", "eval_kl_sft_k3", "eval_kl_anchor", "eval_kl_anchor_k3"], 1),
    ("policy", 1, ["gold_win_rate", "gold_win_rate_reference"], 100),
    ("policy", 2, ["distinct_1", "distinct_2"], 100),
    ("policy", 3, ["eval_response_tokens_mean"], 1),
    ("reward_model", 1, ["rm_pair_loss", "reward_spread"], 1),
    ("reward_model", 2, ["proxy_gold_spearman", "proxy_length_correlation"], 1),
]


@pytest.mark.parametrize(("picture", "axes", "keys", "factor"), MEASURED)
def test_what_is_measured_is_drawn(full_run: Path, picture: str, axes: int, keys: list[str], factor: int) -> None:
    rows = [row for row in read_lines(full_run / "metrics.jsonl") if row["proxy_mean"] is not None]
    lines = draw_run(read_run(full_run))[picture].axes[axes].get_lines()
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
    assert drawn == [([row["step"] for row in rows], [factor * row[key] for row in rows]) for key in keys]


def test_a_win_rate_has_its_interval_as_a_band(full_run: Path) -> None:
    rows = [row for row in read_lines(full_run / "metrics.jsonl") if row["proxy_mean"] is not None]
    ours, references = draw_run(read_run(full_run))["policy"].axes[1].collections
    for band, key in ((ours, "gold_win_rate"), (references, "gold_win_rate_reference")):
        corners = {tuple(corner) for path in band.get_paths() for corner in np.round(path.vertices, 9)}
        ends = {(row["step"], round(100 * row[f"{key}_{end}"], 9)) for row in rows for end in ("low", "high")}
        assert corners >= ends


def test_accuracy_by_gap_leaves_empty_thirds_out(full_run: Path) -> None:
    rows = [row for row in read_lines(full_run / "metrics.jsonl") if row["rm_accuracy_by_gap"]]
    for third in range(3):
        known = [
            (row["step"], 100 * row["rm_accuracy_by_gap"][third]) for row in rows if row["step"] % 20 or third != 1
        ]
        assert list(zip(*line_of(full_run, "reward_model", 0, 1 + third), strict=True)) == known


def test_a_correction_window_holds_what_its_events_tell(tmp_path: Path) -> None:
    steps(tmp_path, {"step": 7, "time_s": 14.0})
    told = {"reward_version": 1, "policy_version": 5, "ess_fraction": 0.25, "lag_steps": 3, "num_rollouts_finished": 24}
    started = {"event": "correction_started", "snapshot_version": 2}
    weights = {"max_weight_share": 0.125, "log_weight_std": 2.5}
    events(
        tmp_path,
        {"time_s": 4.0, **started},
        {"time_s": 6.5, "event": "ratios_scored", **weights},
        {"time_s": 9.0, "event": "refit_finished"},
        {"time_s": 10.0, "event": "promoted", **told},
        {"time_s": 10.5, **started},
        {"time_s": 11.0, "event": "correction_failed"},
        {"time_s": 11.5, **started},
        {"time_s": 12.0, "event": "resumed", "step": 5},
        {"time_s": 13.5, **started},
    )
    first, *others = correction_windows(read_run(tmp_path))
    assert (first.started_s, first.scored_s, first.refitted_s, first.ended_s) == (4.0, 6.5, 9.0, 10.0)
    assert (first.outcome, first.snapshot_version) == ("promoted", 2)
    assert {key: getattr(first, key) for key in told | weights} == told | weights
    assert [(window.outcome, window.started_s, window.ended_s) for window in others] == [
        ("failed", 10.5, 11.0),
        ("cut off", 11.5, 12.0),
        ("in flight", 13.5, 14.0),
    ]


def test_corrections_that_a_resumed_run_does_again_are_not_counted_twice(tmp_path: Path) -> None:
    steps(tmp_path, {"step": 9, "time_s": 90.0})

    def correction(time_s: float, snapshot: int, promoted_at: int) -> list[dict[str, object]]:
        started = {"time_s": time_s, "event": "correction_started", "snapshot_version": snapshot}
        return [started, {"time_s": time_s + 1, "event": "promoted", "policy_version": promoted_at}]

    resumed = {"time_s": 50.0, "event": "resumed", "step": 5}
    lines = [*correction(10.0, 2, 4), *correction(20.0, 4, 6), *correction(30.0, 8, 9), resumed]
    events(tmp_path, *lines, *correction(60.0, 4, 6), *correction(70.0, 8, 9))
    windows = correction_windows(read_run(tmp_path))
    assert [(window.started_s, window.snapshot_version) for window in windows] == [(10.0, 2), (60.0, 4), (70.0, 8)]


def test_the_timeline_draws_each_phase_where_it_happened_and_tells_the_lag(tmp_path: Path) -> None:
    steps(tmp_path, *({"step": s, "time_s": 120.0 * s, "step_s": 2.0, "rollout_tokens": 100} for s in range(1, 8)))
    events(
        tmp_path,
        {"time_s": 240.0, "event": "correction_started"},
        {"time_s": 390.0, "event": "ratios_scored"},
        {"time_s": 540.0, "event": "refit_finished"},
        {"time_s": 600.0, "event": "promoted", "lag_steps": 3},
        {"time_s": 660.0, "event": "correction_started"},
        {"time_s": 720.0, "event": "refit_finished"},
    )
    throughput, timeline = draw_run(read_run(tmp_path))["corrections"].axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in timeline.patches if bar.get_width() > 0]
    assert bars == [(4.0, 6.5), (6.5, 9.0), (11.0, 12.0), (9.0, 10.0), (12.0, 14.0)]
    assert [text.get_text() for text in timeline.texts] == ["lag 3", "in flight"]
    assert list(throughput.get_lines()[0].get_ydata()) == [50.0] * 7
    assert [(patch.get_x(), patch.get_width()) for patch in throughput.patches] == [(4.0, 6.0), (11.0, 3.0)]


def test_a_run_without_gold_says_so_and_shows_the_proxy_alone(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", Shape(num_updates=20, gold=False))
    page = page_of(run_dir)
    assert "No gold reward was measured" in page
    assert "Gold peak" not in page
    pictures = draw_run(read_run(run_dir))
    assert len(pictures["rewards"].axes) == 2
    assert [axes.get_title("left") for axes in pictures["policy"].axes] == [
        "KL of the policy",
        "Diversity of the responses",
        "Response length",
    ]


def test_a_run_of_an_older_version_is_drawn_as_far_as_it_was_measured(tmp_path: Path) -> None:
    steps(tmp_path, {"step": 0, "time_s": 0.0, "proxy_mean": 0.5, "eval_kl_sft": 0.0, "rm_accuracy": 0.75})
    pictures = draw_run(read_run(tmp_path))
    drawn = {name: [len(axes.get_lines()) for axes in pictures[name].axes] for name in ("policy", "reward_model")}
    assert drawn == {"policy": [1], "reward_model": [1]}


def test_a_run_without_corrections_says_so(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", Shape(num_updates=20, correct=False))
    page = page_of(run_dir)
    pictures = draw_run(read_run(run_dir))
    assert [len(pictures[name].axes) for name in ("reward_model", "corrections")] == [3, 1]
    assert "No correction was started" in page
    assert "No gold reward" not in page


def test_one_line_of_metrics_is_enough(tmp_path: Path) -> None:
    steps(tmp_path, {"step": 1, "time_s": 3.0, "step_s": 3.0, "rollout_tokens": 30})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Finished: 1 policy updates." in page
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"corrections", "times"}


def test_an_unfinished_run_is_reported_up_to_where_it_is(tmp_path: Path) -> None:
    shape = Shape(num_updates=25, planned_updates=140, summary=False)
    run_dir = write_run(tmp_path / "run", shape)
    with (run_dir / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 26, "time')
    page = page_of(run_dir)
    assert "Unfinished: 25 of 140 policy updates." in page
    assert not (run_dir / "summary.json").exists()
    gold = [row["gold_mean"] for row in read_jsonl(run_dir / "metrics.jsonl") if row["gold_mean"] is not None]
    assert f"{sum(gold) / 3:.3f}" in page  # three evaluations: the peak is their mean


def test_a_run_with_a_configuration_only_says_that_nothing_is_there_yet(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: early\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No policy update yet." in page
    assert "<img" not in page


def test_a_folder_that_is_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="need a run folder") as caught:
            write_report(folder)
        assert str(folder) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_line_amid_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 1}\nnot json\n{"step": 2, "time_s": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        write_report(tmp_path)


def test_hostile_samples_are_shown_as_text_and_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", Shape(num_updates=10))
    hostile = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>'
    row = {"step": 10, "prompt": hostile, "response": hostile, "proxy": 1.0, "gold": None, "length": 3}
    with (run_dir / "samples.jsonl").open("a") as samples:
        samples.write(json.dumps(row) + "\n")
    page = page_of(run_dir)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 2
    tags = re.findall(r"<[^>]*>", page) + re.findall(r"<style>.*?</style>", page, flags=re.DOTALL)
    assert not [tag for tag in tags if "//" in tag or "@import" in tag or "url(" in tag]


def test_samples_of_the_first_and_the_last_evaluation_stand_side_by_side(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", Shape(num_updates=30)))
    rows = re.findall(r"<tr><td>river stone market 1</td>(.*?)</tr>", page, flags=re.DOTALL)
    assert len(rows) == 1
    assert re.search(r"said 0 times.*said 30 times", rows[0], flags=re.DOTALL)
    assert "said 10 times" not in page


def test_deaths_and_resumes_are_listed(tmp_path: Path) -> None:
    with RunLog(tmp_path, Clock()) as log:
        log.event("actor_died", actor="scoring-0", cause="killed <9>")
        log.event("checkpoint_saved", step=1)
    page = page_of(tmp_path)
    assert "actor_died" in page
    assert "actor scoring-0, cause killed &lt;9&gt;" in page
    assert "checkpoint_saved" not in page


def test_writing_the_report_again_gives_the_same_bytes(full_run: Path) -> None:
    before = {path: path.read_bytes() for path in [full_run / "report.html", *(full_run / "plots").iterdir()]}
    write_report(full_run)
    assert {path: path.read_bytes() for path in before} == before


def test_the_totals_of_the_page_are_reduced_over_the_steps(tmp_path: Path) -> None:
    idle = {"generation": 0.25, "policy": 0.5, "scoring": 1.0, "reward": 0.0}
    rows = [
        {"step": 0, "time_s": 0.0, "step_s": None},
        *(
            {"step": s, "time_s": t, "step_s": t, "num_reissued": s, "logprob_gap": 0.1 * s, "idle_share": idle}
            for s, t in TIMES
        ),
    ]
    steps(tmp_path, *rows)
    table = page_of(tmp_path).split("Time and pools")[1]
    assert dict(re.findall(r'<tr><th scope="row">(.*?)</th><td class="number">(.*?)</td>', table)) == {
        "Step": "2.000",
        "Rollouts issued again": "6",
        "Trainer against sampler": "0.300",
        "Idle: generation": "25.0%",
        "Idle: policy": "50.0%",
        "Idle: scoring": "100.0%",
        "Idle: reward": "0.0%",
    }


def test_figures_read_well() -> None:
    assert [figure_text(None), figure_text(float("nan")), figure_text(12400), figure_text(-1.23456)] == [
        "n/a",
        "n/a",
        "12,400",
        "-1.235",
    ]
