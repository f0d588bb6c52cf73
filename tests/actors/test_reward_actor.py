"""Serving and refitting reward models, with real DeepSpeed engines in this process."""

from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from tiny_models import BAD, EOS, GOOD, pad_batch, random_pairs, run_config, save_pairs, save_policy, save_reward_model

from actors.reward import RewardRefitter, RewardServer
from ocrm_ray import batches
from ocrm_ray.networks import last_token_scores, load_reward_model
from ocrm_ray.preferences import Pair
from ocrm_ray.records import RefitReport, RefitRequest, Sequence

pytestmark = pytest.mark.real

TRAINING = {"batch_size": 64, "micro_batch_size": 64, "learning_rate": 1e-2, "num_epochs": 3}


def flipped(pair):
    return Pair(pair.prompt_text, pair.rejected, pair.chosen)


def make_refitter(tmp_path, train, heldout=None, correction=None, training=TRAINING, zero_stage=0):
    base = save_reward_model(tmp_path / "base")
    sections = {"reward": {"base": base, "training": training}, "policy": {"zero_stage": zero_stage}}
    config = run_config(tmp_path, correction={"training": training} | (correction or {}), **sections)
    save_pairs(config, train, heldout or random_pairs(200, seed=99))
    refitter = RewardRefitter(config, save_policy(tmp_path / "sft"), None, config.run_dir)
    refitter.start()
    return refitter


def request(num_pairs, weights=None, version=1, seed=0):
    weights = None if weights is None else np.asarray(weights, dtype=np.float32)
    return RefitRequest(version, np.arange(num_pairs), weights, seed)


def scores_of(folder, pairs):
    model = load_reward_model(folder, dtype="float32", trust_remote_code=False)
    with torch.no_grad():
        return [
            last_token_scores(model, pad_batch([getattr(p, side) for p in pairs], EOS))
            for side in ("chosen", "rejected")
        ]


def test_first_reward_model_learns_a_separable_preference(tmp_path):
    refitter = make_refitter(tmp_path, random_pairs(800, seed=1))
    report = refitter.fit_first()
    assert report.reward_version == 0
    assert report.heldout_accuracy > 0.95
    assert report.loss < 0.3
    chosen, rejected = scores_of(tmp_path / "test" / "stages" / "reward", random_pairs(200, seed=99))
    assert (chosen > rejected).float().mean() == pytest.approx(report.heldout_accuracy, abs=1e-6)


def test_weights_of_zero_on_mislabelled_pairs_restore_the_order(tmp_path):
    good = random_pairs(300, seed=1)
    wrong = [flipped(pair) for pair in random_pairs(500, seed=2)]
    refitter = make_refitter(tmp_path, good + wrong)
    weighted = refitter.refit(request(800, weights=[1.0] * 300 + [0.0] * 500))
    uniform = refitter.refit(request(800, version=2))
    assert weighted.heldout_accuracy > 0.9
    assert uniform.heldout_accuracy < 0.3


def test_refit_uses_the_pairs_of_its_indices(tmp_path):
    train = [flipped(pair) for pair in random_pairs(400, seed=2)] + random_pairs(400, seed=1)
    refitter = make_refitter(tmp_path, train)
    report = refitter.refit(replace(request(400), indices=np.arange(400, 800)))
    assert report.heldout_accuracy > 0.9


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_refit_does_not_depend_on_the_micro_batch_tokens(tmp_path, monkeypatch, zero_stage):
    monkeypatch.setattr(batches, "SMALL_BLOCK", 30)  # so that a forward pass is several blocks
    train = random_pairs(100, seed=1)
    weights = np.linspace(0, 2, 100)
    results = []
    for tokens in (1, 200, 16384):
        folder, training = tmp_path / str(tokens), TRAINING | {"micro_batch_tokens": tokens, "learning_rate": 1e-3}
        refitter = make_refitter(folder, train, training=training | {"num_epochs": 2}, zero_stage=zero_stage)
        results.append((refitter.refit(request(100, weights)), scores_of(folder / "test/reward/v1", train)))
    for report, scores in results[1:]:
        assert report.loss == pytest.approx(results[0][0].loss, rel=1e-4)
        torch.testing.assert_close(scores, results[0][1], atol=1e-3, rtol=1e-3)


def test_refit_starts_where_the_configuration_says(tmp_path):
    """With a learning rate of nearly nothing the result is the beginning."""
    still = TRAINING | {"learning_rate": 1e-12, "num_epochs": 1}
    train = random_pairs(70, seed=1)
    scores = {}
    for rm_init in ("base", "sft", "previous"):
        refitter = make_refitter(tmp_path / rm_init, train, correction={"rm_init": rm_init}, training=still)
        refitter.reward_path = save_reward_model(tmp_path / rm_init / "live", seed=8)
        report = refitter.refit(request(70))
        scores[rm_init] = scores_of(report.path, train)[0]
    expected = {"base": "base/base", "previous": "previous/live", "sft": "sft/sft"}
    for rm_init, folder in expected.items():
        model = load_reward_model(tmp_path / folder, dtype="float32", trust_remote_code=False, head_seed=0)
        with torch.no_grad():
            initial = last_token_scores(model, pad_batch([pair.chosen for pair in train], EOS))
        torch.testing.assert_close(scores[rm_init], initial, atol=1e-5, rtol=0)


def test_previous_means_the_version_before_the_candidate(tmp_path):
    still = TRAINING | {"learning_rate": 1e-12, "num_epochs": 1}
    train = random_pairs(70, seed=1)
    refitter = make_refitter(tmp_path, train, correction={"rm_init": "previous"}, training=still)
    promoted = save_reward_model(tmp_path / "test" / "reward" / "v4", seed=8)
    report = refitter.refit(request(70, version=5))
    torch.testing.assert_close(scores_of(report.path, train), scores_of(promoted, train), atol=1e-5, rtol=0)


def test_many_refits_in_one_process_leave_no_memory_behind(tmp_path):
    refitter = make_refitter(tmp_path, random_pairs(128, seed=1), training=TRAINING | {"num_epochs": 1})
    process = psutil.Process()
    sizes = []
    for version in range(1, 8):
        refitter.refit(request(128, version=version))
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[1] < 20 * 2**20


def groups_of(num_groups, seed=0):
    """Two or three random responses to each prompt."""
    generator = np.random.default_rng(seed)
    return tuple(
        tuple(
            Sequence((3, int(number) % 20 + 5), tuple(map(int, generator.integers(3, 30, 4))), True)
            for _ in range(2 + int(number) % 2)
        )
        for number in range(num_groups)
    )


def refitted(tmp_path, strategy, zero_stage=0, groups=(), **settings):
    """Scores of some pairs by a model refitted by ``strategy``, and the refit's report."""
    correction = {"strategy": strategy} | ({strategy: settings} if settings else {})
    train = random_pairs(120, seed=1)
    quick = TRAINING | {"num_epochs": 1, "learning_rate": 1e-3}
    refitter = make_refitter(tmp_path, train, correction=correction, training=quick, zero_stage=zero_stage)
    report = refitter.refit(replace(request(120), groups=groups))
    return torch.stack(scores_of(report.path, train)), report


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_metarm_with_eta_0_is_the_plain_refit_to_the_last_bit(tmp_path, zero_stage):
    plain, _ = refitted(tmp_path / "plain", "refit", zero_stage)
    meta, _ = refitted(tmp_path / "meta", "metarm", zero_stage, groups_of(20), eta=0.0)
    assert torch.equal(plain, meta)


def test_metarm_changes_what_a_refit_learns_and_tells_the_spread(tmp_path):
    plain, _ = refitted(tmp_path / "plain", "refit")
    meta, report = refitted(tmp_path / "meta", "metarm", groups=groups_of(20), eta=0.3)
    assert (plain - meta).abs().max() > 1e-3
    assert 0.25 <= report.figures["reward_spread"] < 2 / 3  # J of 2 and of 3 responses


def test_the_representation_loss_with_coefficient_0_is_the_plain_refit(tmp_path):
    plain, _ = refitted(tmp_path / "plain", "refit")
    views, report = refitted(tmp_path / "views", "rlp_uml", groups=groups_of(20), coefficient=0.0)
    assert torch.equal(plain, views)
    assert np.isfinite(report.figures["view_loss"])


def test_the_representation_loss_moves_the_backbone(tmp_path):
    plain, _ = refitted(tmp_path / "plain", "refit")
    views, _ = refitted(tmp_path / "views", "rlp_uml", groups=groups_of(20), coefficient=5.0)
    assert (plain - views).abs().max() > 1e-3


def test_extra_pairs_are_trained_on_beside_the_runs_own(tmp_path):
    wrong = [flipped(pair) for pair in random_pairs(100, seed=2)]
    right = tuple((pair.chosen, pair.rejected) for pair in random_pairs(900, seed=1))
    refitter = make_refitter(tmp_path, wrong)
    assert refitter.refit(request(100)).heldout_accuracy < 0.4
    report = refitter.refit(replace(request(100, version=2), extra_pairs=right))
    assert report.heldout_accuracy > 0.8


def test_a_plain_refit_after_one_with_extra_pairs_does_not_see_them(tmp_path):
    refitter = make_refitter(tmp_path, random_pairs(100, seed=1))
    plain = refitter.refit(request(100))
    right = tuple((pair.chosen, pair.rejected) for pair in random_pairs(200, seed=2))
    refitter.refit(replace(request(100, version=2), extra_pairs=right))
    again = refitter.refit(request(100, version=3))
    assert (again.loss, again.heldout_accuracy) == (plain.loss, plain.heldout_accuracy)


@pytest.fixture
def server(tmp_path):
    config = run_config(tmp_path, reward={"num_calibration": 33}, pools={"reward": {"batch_size": 16}})
    save_pairs(config, random_pairs(40, seed=1))
    server = RewardServer(config, save_reward_model(tmp_path / "rm"))
    server.start()
    return server


def calibration_set(num_sequences=33):
    return [s for pair in random_pairs(40, seed=1) for s in (pair.chosen, pair.rejected)][:num_sequences]


def staged(server, tmp_path, seed=8):
    refit = RefitReport(1, save_reward_model(tmp_path / "next", seed=seed), 0.0, 0.0, 0.0)
    return server.stage("snapshot-5", refit)


def test_scores_are_those_at_the_last_token_less_the_calibration_mean(server, tmp_path):
    model = load_reward_model(tmp_path / "rm", dtype="float32", trust_remote_code=False)
    pairs = random_pairs(20, seed=5)
    with torch.no_grad():
        mean = last_token_scores(model, pad_batch(calibration_set(), EOS)).mean()
        expected = [float(last_token_scores(model, pad_batch([pair.chosen], EOS))[0] - mean) for pair in pairs]
    np.testing.assert_allclose(server.score([pair.chosen for pair in pairs]), expected, atol=1e-5)


def test_every_version_has_mean_zero_on_the_calibration_set(server, tmp_path):
    found = staged(server, tmp_path)
    assert abs(server.score(calibration_set()).mean()) < 1e-5
    scores = server.score(calibration_set(), "snapshot-5")
    assert abs(scores.mean()) < 1e-5
    assert scores.std() == pytest.approx(found.std, rel=1e-4)


def test_scale_divides_by_the_spread_on_the_calibration_set(tmp_path):
    config = run_config(tmp_path, reward={"num_calibration": 33, "scale": "calibration_std"})
    save_pairs(config, random_pairs(40, seed=1))
    server = RewardServer(config, save_reward_model(tmp_path / "rm"))
    server.start()
    assert server.score(calibration_set()).std() == pytest.approx(1.0, rel=1e-4)


def test_candidate_serves_in_its_slot_and_is_live_after_the_commit(server, tmp_path):
    sequences = [pair.chosen for pair in random_pairs(20, seed=5)]
    old = server.score(sequences)
    staged(server, tmp_path)
    new = server.score(sequences, "snapshot-5")
    np.testing.assert_array_equal(server.score(sequences), old)
    assert not np.allclose(new, old)
    server.commit("snapshot-5", 1)
    np.testing.assert_array_equal(server.score(sequences), new)
    np.testing.assert_array_equal(server.score(sequences, "snapshot-5"), new)


def test_commit_again_leaves_a_later_candidate_staged(server, tmp_path):
    sequences = [pair.chosen for pair in random_pairs(20, seed=5)]
    staged(server, tmp_path)
    server.commit("snapshot-5", 1)
    live = server.score(sequences)
    server.stage("snapshot-9", RefitReport(2, save_reward_model(tmp_path / "n", seed=9), 0.0, 0.0, 0.0))
    server.commit("snapshot-5", 1)
    np.testing.assert_array_equal(server.score(sequences), live)
    with pytest.raises(AssertionError, match="no reward model in slot"):
        server.score(sequences, "snapshot-77")


def test_words_that_pairs_reward_are_worth_more(tmp_path):
    refitter = make_refitter(tmp_path, random_pairs(600, seed=1))
    refitter.fit_first()
    good, bad = (
        Pair("", *[replace(random_pairs(1, seed=3)[0].chosen, response_ids=(word,) * 4 + (EOS,))] * 2)
        for word in (GOOD, BAD)
    )
    chosen, _ = scores_of(tmp_path / "test" / "stages" / "reward", [good, bad])
    assert chosen[0] > chosen[1]
