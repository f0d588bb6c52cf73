import json
import math
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from synthetic_runs import Shape, read_lines, write_run

from ocrm_ray.config import StudyConfig
from ocrm_ray.config_file import EARLY_STOPPING, load_study_config, study_runs
from ocrm_ray.errors import UserError
from ocrm_ray.plots import draw_study, mean_over_seeds
from ocrm_ray.run_files import read_run
from ocrm_ray.seed_statistics import mean_interval, paired_bootstrap, student_quantile
from ocrm_ray.study_report import (
    compare,
    markdown_table,
    rewrite_study,
    stopped_figures,
    study_table,
    summarise_study,
    table_rows,
    table_titles,
    write_study,
)

ARMS = {"none": Shape(num_updates=80, decline=0.3, correct=False), "ocrm": Shape(num_updates=80, decline=0.01)}
SEEDS = (1, 2)
ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "configs" / "study").glob("*.json"))
"""Committed beside the studies that they are of."""


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "praise"
    for arm, shape in ARMS.items():
        for seed in SEEDS:
            write_run(folder / arm / f"seed-{seed}", replace(shape, seed=seed))
    write_study(folder, plan(*ARMS))
    return folder


def plan(*arms: str, seeds: tuple[int, ...] = SEEDS, **settings: object) -> StudyConfig:
    return StudyConfig.model_validate(
        {"name": "praise", "base": {}, "arms": {arm: {} for arm in arms}, "seeds": seeds, **settings}
    )


def study_of(folder: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return json.loads((folder / "study.json").read_text())


def test_means_and_deviations_over_seeds_are_those_of_the_summaries(study_dir: Path) -> None:
    study = study_of(study_dir)
    assert [figures["seeds_planned"] for figures in study["arms"].values()] == [[1, 2], [1, 2]]
    for arm in ARMS:
        saved = [json.loads((study_dir / arm / f"seed-{seed}" / "summary.json").read_text()) for seed in SEEDS]
        for key in ("gold_peak", "gold_mean", "gold_drop_from_peak", "proxy_mean", "kl_sft", "wall_s"):
            one, two = (summary[key] for summary in saved)
            assert study["arms"][arm]["mean"][key] == pytest.approx((one + two) / 2, rel=1e-12)
            assert study["arms"][arm]["sd"][key] == pytest.approx(abs(one - two) / math.sqrt(2), rel=1e-9)
            half = math.tan(0.95 * math.pi / 2) * abs(one - two) / 2  # Student's t with one degree: Cauchy
            assert study["arms"][arm]["interval"][key] == pytest.approx(
                [(one + two) / 2 - half, (one + two) / 2 + half]
            )
        shares = [summary["gold_mean"] / summary["gold_peak"] for summary in saved]
        assert study["arms"][arm]["mean"]["gold_share_of_peak"] == pytest.approx(sum(shares) / 2)


def test_corrections_are_counted_and_their_ess_averaged(study_dir: Path) -> None:
    seed = study_of(study_dir)["arms"]["ocrm"]["seeds"]["1"]
    promoted = [e for e in read_lines(study_dir / "ocrm" / "seed-1" / "events.jsonl") if e["event"] == "promoted"]
    assert seed["corrections"] == len(promoted) > 0
    assert seed["ess_fraction"] == pytest.approx(np.mean([event["ess_fraction"] for event in promoted]))
    assert seed["lag_steps"] == 4
    assert study_of(study_dir)["arms"]["none"]["seeds"]["1"]["ess_fraction"] is None


def test_the_terminal_table_is_aligned_and_tells_each_arms_means(study_dir: Path) -> None:
    study = study_of(study_dir)
    header, *rows = study_table(study).splitlines()
    assert [row.split()[0] for row in rows] == list(ARMS)
    assert len({len(line) for line in (header, *rows)}) == 1
    for row, arm in zip(rows, ARMS, strict=True):
        mean, interval = (study["arms"][arm][kind] for kind in ("mean", "interval"))
        for key in ("gold_peak", "gold_mean", "gold_drop_from_peak", "gold_win_rate", "proxy_mean"):
            low, high = interval[key]
            assert f"{mean[key]:.2f} ± {(high - low) / 2:.2f}" in row
    assert "n/a" in rows[0]


def test_the_page_shows_the_table_the_runs_and_the_picture_from_this_folder_only(study_dir: Path) -> None:
    page = (study_dir / "study.html").read_text(encoding="utf-8")
    study = study_of(study_dir)
    for arm in ARMS:
        assert f"{study['arms'][arm]['mean']['gold_mean']:.2f} ±" in page
        accuracy = read_lines(study_dir / arm / "seed-1" / "metrics.jsonl")[-1]["rm_accuracy"]
        assert study["arms"][arm]["seeds"]["1"]["rm_accuracy"] == accuracy
        for seed in SEEDS:
            assert f"{study['arms'][arm]['seeds'][str(seed)]['gold_mean']:.2f}</td>" in page
    assert re.findall(r'(?:src|href)="([^"]+)"', page) == [
        "study.png",
        *(f"{arm}/seed-{seed}/report.html" for arm in ARMS for seed in SEEDS),
    ]
    assert imread(study_dir / "study.png")[..., :3].std() > 0.05


def test_the_picture_draws_every_seed_and_the_mean(study_dir: Path) -> None:
    arms = {arm: [read_run(study_dir / arm / f"seed-{seed}") for seed in SEEDS] for arm in ARMS}
    figure = draw_study(arms)
    panels = [(x_key, y_key) for y_key in ("gold_mean", "proxy_mean") for x_key in ("step", "eval_kl_sft")]
    for axes, (x_key, y_key) in zip(figure.axes, panels, strict=True):
        lines = axes.get_lines()
        assert len(lines) == 6
        for index, runs in enumerate(arms.values()):
            seeds = [np.array([[row[x_key], row[y_key]] for row in run.evaluations], dtype=float).T for run in runs]
            for line, (x, y) in zip(lines[3 * index :], [*seeds, np.mean(seeds, axis=0)], strict=False):
                np.testing.assert_allclose(line.get_xdata(), np.sqrt(x) if x_key == "eval_kl_sft" else x, rtol=1e-6)
                np.testing.assert_allclose(line.get_ydata(), y, rtol=1e-12)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(ARMS)


def test_the_mean_stops_where_the_shortest_seed_stops(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / str(n), Shape(num_updates=n, seed=n))) for n in (40, 20)]
    means = mean_over_seeds(runs)
    assert [row["step"] for row in means] == [0, 10, 20]
    expected = [np.mean([run.evaluations[i]["gold_mean"] for run in runs]) for i in range(3)]
    np.testing.assert_allclose([row["gold_mean"] for row in means], expected, rtol=1e-12)


def test_missing_runs_are_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "ocrm" / "seed-1", Shape(num_updates=20))
    write_run(tmp_path / "ocrm" / "seed-2", Shape(num_updates=20, summary=False))
    page = write_study(tmp_path, plan("none", "ocrm")).read_text()
    study = study_of(tmp_path)
    assert (study["arms"]["none"]["missing_seeds"], study["arms"]["ocrm"]["missing_seeds"]) == ([1, 2], [2])
    assert study["arms"]["ocrm"]["sd"]["gold_mean"] is None
    assert "Missing: arm none, seed 2." in page
    assert study_table(study).splitlines()[-1].split()[:4] == ["ocrm", "1", "of", "2"]


def test_a_study_without_gold_says_so_and_compares_the_proxy(tmp_path: Path) -> None:
    write_run(tmp_path / "ocrm" / "seed-1", Shape(num_updates=20, gold=False))
    page = write_study(tmp_path, plan("ocrm", seeds=(1,))).read_text()
    assert "No gold reward was measured" in page
    assert study_of(tmp_path)["arms"]["ocrm"]["mean"]["gold_mean"] is None
    assert len(draw_study({"ocrm": [read_run(tmp_path / "ocrm" / "seed-1")]}).axes) == 2


def test_the_share_of_a_peak_below_zero_is_not_given(tmp_path: Path) -> None:
    run_dir = tmp_path / "ocrm" / "seed-1"
    run_dir.mkdir(parents=True)
    row = {"step": 1, "time_s": 2.0, "proxy_mean": 1.0, "gold_mean": -2.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run_dir / "summary.json").write_text("{}")
    write_study(tmp_path, plan("ocrm", seeds=(1,)))
    mean = study_of(tmp_path)["arms"]["ocrm"]["mean"]
    assert (mean["gold_peak"], mean["gold_share_of_peak"], mean["gold_drop_from_peak"]) == (-2.0, None, 0.0)


def test_a_folder_without_any_of_the_runs_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the study's runs"):
        write_study(tmp_path, plan("ocrm", seeds=(1,)))
    assert list(tmp_path.iterdir()) == []


QUANTILES = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 4: 2.7764451, 5: 2.5705818, 9: 2.2621572, 30: 2.0422725}
"""Of Student's distribution at 0.975, from printed tables."""


@pytest.mark.parametrize("df", QUANTILES)
def test_students_quantile_is_that_of_the_tables_and_holds_95_percent_of_the_density(df: int) -> None:
    t = student_quantile(df)
    assert t == pytest.approx(QUANTILES[df], abs=5e-8)
    x = np.linspace(-t, t, 200_001)
    constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    assert np.trapezoid(constant * (1 + x**2 / df) ** (-(df + 1) / 2), x) == pytest.approx(0.95, abs=1e-8)


def test_the_interval_of_three_values_is_the_textbooks() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3026527 / math.sqrt(3), 2 + 4.3026527 / math.sqrt(3)))
    assert mean_interval([1.0]) is None


def test_the_bootstrap_agrees_with_every_resample_enumerated() -> None:
    differences = [-0.4, 0.1, 0.3, 0.9, 0.25]
    means = np.array([np.mean(draw) for draw in product(differences, repeat=5)])
    (low, high), share = paired_bootstrap(differences)
    assert share == pytest.approx((means > 0).mean(), abs=0.015)
    assert (means < low).mean() == pytest.approx(0.025, abs=0.01)
    assert (means > high).mean() == pytest.approx(0.025, abs=0.01)
    assert paired_bootstrap(differences) == ((low, high), share)


def test_the_bootstrap_of_equal_differences_is_that_difference() -> None:
    assert paired_bootstrap([0.5, 0.5]) == ((0.5, 0.5), 1.0)
    assert paired_bootstrap([0.0, 0.0]) == ((0.0, 0.0), 0.0)


def golds(**by_seed: float | None) -> dict[int, dict[str, float | None]]:
    return {int(seed[1:]): {"gold_mean": gold} for seed, gold in by_seed.items()}


def test_only_seeds_that_both_have_are_compared() -> None:
    control = golds(s1=1.0, s2=2.0, s3=4.0, s5=None)
    ours = golds(s3=5.0, s2=2.5, s4=100.0, s5=7.0)
    found = compare(ours, control)
    assert found is not None
    assert (found["num_seeds"], found["mean"]) == (2, 0.75)
    assert (found["interval"], found["share_above"]) == paired_bootstrap([1.0, 0.5])
    one = compare(golds(s1=0.0), control)
    assert one == {"num_seeds": 1, "mean": -1.0, "interval": None, "share_above": None}
    assert compare(golds(s4=1.0), control) is None
    assert compare(ours, {}) is None


def halves(step: int, even: float, odd: float, kl: float) -> dict[str, float]:
    return {
        "step": step, "time_s": 10.0 * step, "proxy_mean": float(step), "eval_kl_sft": kl,
        "gold_mean": (even + odd) / 2, "gold_mean_even": even, "gold_mean_odd": odd,
    }  # fmt: skip


def test_early_stopping_is_chosen_on_one_half_and_told_of_the_other() -> None:
    rows = [halves(0, 0.0, 0.1, 0.0), halves(10, 3.0, 2.0, 1.0), halves(20, 2.5, 2.8, 3.0), halves(30, 1.0, 0.5, 9.0)]
    found = stopped_figures(rows)
    assert found is not None
    assert found["chosen"] == [10, 20]
    assert found["gold_mean"] == pytest.approx((2.0 + 2.5) / 2)
    assert (found["kl_sft"], found["steps"], found["wall_s"], found["gold_win_rate"]) == (2.0, 15, 150.0, None)
    assert found["rm_accuracy"] is None
    accuracies = [row | {"rm_accuracy": 0.25 + 0.01 * row["step"]} for row in rows]
    assert stopped_figures(accuracies)["rm_accuracy"] == pytest.approx((0.35 + 0.45) / 2)  # type: ignore[index]


def test_runs_without_the_halves_are_not_stopped() -> None:
    assert stopped_figures([{"step": 0, "proxy_mean": 1.0, "gold_mean": 1.0}]) is None
    assert stopped_figures([]) is None


def test_a_study_compares_with_its_control_and_stops_it_early(study_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(study_dir, folder)
    page = write_study(folder, plan("none", "ocrm", control="none", early_stopping="none"))
    study = study_of(folder)
    runs = {arm: figures["seeds"] for arm, figures in study["arms"].items()}
    assert list(runs) == ["none", "ocrm", "early_stopping"]
    gains = [runs["ocrm"][seed]["gold_mean"] - runs["none"][seed]["gold_mean"] for seed in ("1", "2")]
    assert study["arms"]["ocrm"]["against_control"]["mean"] == pytest.approx(np.mean(gains))
    assert study["arms"]["none"]["against_control"] is None
    # even and odd are gold ± 0.05 here: both halves choose the same evaluation, the best
    best = max(row["gold_mean"] for row in read_run(folder / "none" / "seed-1").evaluations)
    assert runs["early_stopping"]["1"]["gold_mean"] == pytest.approx(best)
    low, high = study["arms"]["ocrm"]["against_control"]["interval"]
    assert f"{np.mean(gains):+.2f} ({low:+.2f} to {high:+.2f})" in study_table(study).splitlines()[2]
    assert table_titles(study)[-2:] == ["gold - none", "above 0"]
    assert len({len(line) for line in study_table(study).splitlines()}) == 1
    assert 'href="early_stopping' not in page.read_text()
    assert "Against none" in page.read_text()


def test_arms_with_seeds_of_their_own_have_rows_of_their_own_count(study_dir: Path) -> None:
    runs = {"none": {1: read_run(study_dir / "none" / "seed-1")}, "ocrm": {2: read_run(study_dir / "ocrm" / "seed-2")}}
    study = summarise_study(plan("none", "ocrm", arm_seeds={"none": (1, 2, 3)}, seeds=(2,), control="none"), runs)
    assert [figures["missing_seeds"] for figures in study["arms"].values()] == [[2, 3], []]
    rows = study_table(study).splitlines()
    assert rows[1].split()[:4] == ["none", "1", "of", "3"]
    assert rows[2].split()[:2] == ["ocrm", "1"]
    assert study["arms"]["ocrm"]["against_control"] is None


def test_a_report_is_rebuilt_from_the_folder_alone(study_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "praise"
    shutil.copytree(study_dir, folder)
    write_study(folder, plan("none", "ocrm", arm_seeds={"none": (2, 1, 9)}, control="none", early_stopping="none"))
    before = (folder / "study.json").read_text(), (folder / "study.html").read_text()
    (folder / "study.html").unlink()
    assert rewrite_study(folder) == folder / "study.html"
    assert ((folder / "study.json").read_text(), (folder / "study.html").read_text()) == before


def test_the_markdown_table_has_the_same_cells_as_the_plain_one(study_dir: Path) -> None:
    study = json.loads((study_dir / "study.json").read_text())
    titles, marks, *rows = (study_dir / "study.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (titles, *rows)]
    assert cells == [table_titles(study), *table_rows(study)]
    assert marks.count("---") == len(cells[0])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_in_the_readme_is_made_from_the_committed_results(path: Path) -> None:
    study = json.loads(path.read_text(encoding="utf-8"))
    assert study["name"] == path.stem
    assert markdown_table(study) in (ROOT / "README.md").read_text(encoding="utf-8")
    seeds = {arm: figures["seeds_planned"] for arm, figures in study["arms"].items() if arm != EARLY_STOPPING}
    plan = load_study_config(path.with_suffix(".yaml"), [])
    assert seeds == {arm: list(plan.seeds_of(arm)) for arm in plan.arms}
    for arm, seed, run in study_runs(plan):
        assert study["arms"][arm]["seeds"][str(seed)]["steps"] == run.policy.num_updates, (arm, seed)
