import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from synthetic_runs import Shape, read_lines, write_run

from ocrm_ray.errors import UserError
from ocrm_ray.plots import draw_study, mean_over_seeds
from ocrm_ray.run_files import read_run
from ocrm_ray.study_report import study_table, write_study

ARMS = {"none": Shape(num_updates=80, decline=0.3, correct=False), "ocrm": Shape(num_updates=80, decline=0.01)}
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "praise"
    for arm, shape in ARMS.items():
        for seed in SEEDS:
            write_run(folder / arm / f"seed-{seed}", replace(shape, seed=seed))
    write_study(folder, list(ARMS), SEEDS)
    return folder


def study_of(folder: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return json.loads((folder / "study.json").read_text())


def test_means_and_deviations_over_seeds_are_those_of_the_summaries(study_dir: Path) -> None:
    study = study_of(study_dir)
    assert study["seeds"] == [1, 2]
    for arm in ARMS:
        saved = [json.loads((study_dir / arm / f"seed-{seed}" / "summary.json").read_text()) for seed in SEEDS]
        for key in ("gold_peak", "gold_mean", "gold_drop_from_peak", "proxy_mean", "kl_sft", "wall_s"):
            one, two = (summary[key] for summary in saved)
            assert study["arms"][arm]["mean"][key] == pytest.approx((one + two) / 2, rel=1e-12)
            assert study["arms"][arm]["sd"][key] == pytest.approx(abs(one - two) / math.sqrt(2), rel=1e-9)
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
        mean, deviation = (study["arms"][arm][kind] for kind in ("mean", "sd"))
        for key in ("gold_peak", "gold_mean", "gold_share_of_peak", "proxy_mean"):
            assert f"{mean[key]:.2f} ± {deviation[key]:.2f}" in row
    assert "n/a" in rows[0]


def test_the_page_shows_the_table_the_runs_and_the_picture_from_this_folder_only(study_dir: Path) -> None:
    page = (study_dir / "study.html").read_text(encoding="utf-8")
    study = study_of(study_dir)
    for arm in ARMS:
        assert f"{study['arms'][arm]['mean']['gold_mean']:.2f} ±" in page
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
    (tmp_path / "ocrm" / "seed-2").mkdir()
    page = write_study(tmp_path, ["none", "ocrm"], (1, 2)).read_text()
    study = study_of(tmp_path)
    assert (study["arms"]["none"]["missing_seeds"], study["arms"]["ocrm"]["missing_seeds"]) == ([1, 2], [2])
    assert study["arms"]["ocrm"]["sd"]["gold_mean"] is None
    assert "Missing: arm none, seed 2." in page
    assert study_table(study).splitlines()[-1].split()[:4] == ["ocrm", "1", "of", "2"]


def test_a_study_without_gold_says_so_and_compares_the_proxy(tmp_path: Path) -> None:
    write_run(tmp_path / "ocrm" / "seed-1", Shape(num_updates=20, gold=False))
    page = write_study(tmp_path, ["ocrm"], (1,)).read_text()
    assert "No gold reward was measured" in page
    assert study_of(tmp_path)["arms"]["ocrm"]["mean"]["gold_mean"] is None
    assert len(draw_study({"ocrm": [read_run(tmp_path / "ocrm" / "seed-1")]}).axes) == 2


def test_the_share_of_a_peak_below_zero_is_not_given(tmp_path: Path) -> None:
    run_dir = tmp_path / "ocrm" / "seed-1"
    run_dir.mkdir(parents=True)
    row = {"step": 1, "time_s": 2.0, "proxy_mean": 1.0, "gold_mean": -2.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_study(tmp_path, ["ocrm"], (1,))
    mean = study_of(tmp_path)["arms"]["ocrm"]["mean"]
    assert (mean["gold_peak"], mean["gold_share_of_peak"], mean["gold_drop_from_peak"]) == (-2.0, None, 0.0)


def test_a_folder_without_any_of_the_runs_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the study's runs"):
        write_study(tmp_path, ["ocrm"], (1,))
    assert list(tmp_path.iterdir()) == []
