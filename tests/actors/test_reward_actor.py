"""Serving and refitting reward models, with real DeepSpeed engines in this process."""

from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from disk_faults import files_up_to
from safetensors.torch import load_file
from tiny_models import (
    BAD,
    EOS,
    GOOD,
    build_tokenizer,
    pad_batch,
    random_pairs,
    run_config,
    save_pairs,
    save_policy,
    save_reward_model,
)

from actors import reward_fit
from actors.reward import RewardRefitter, RewardServer
from ocrm_ray import batches
from ocrm_ray.networks import last_token_scores, load_reward_model, save_model
from ocrm_ray.preferences import Pair
from ocrm_ray.records import RefitReport, RefitRequest, Sequence

pytestmark = pytest.mark.real

TRAINING = {"batch_size": 64, "micro_batch_size": 64, "learning_rate": 1e-2, "num_epochs": 3}


def flipped(pair):
    return Pair(pair.prompt_text, pair.rejected, pair.chosen)


def make_refitter(
    tmp_path, train, heldout=None, correction=None, training=TRAINING, zero_stage=0, dtype="float32", num_members=1
):
    base = save_reward_model(tmp_path / "base")
    reward = {"base": base, "training": training, "ensemble": {"num_members": num_members}}
    pools = {"reward": {"dtype": dtype}}
    sections = {"reward": reward, "policy": {"zero_stage": zero_stage}, "pools": pools}
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


def test_a_refit_that_the_disk_refuses_leaves_no_model_and_the_next_one_is_that_of_a_good_disk(tmp_path):
    pairs = random_pairs(100, seed=1)
    good, other = make_refitter(tmp_path / "good", pairs), make_refitter(tmp_path / "other", pairs)
    expected = good.refit(request(100))
    with files_up_to(1000), pytest.raises(Exception, match="File too large"):
        other.refit(request(100))
    written = tmp_path / "other" / "test" / "reward" / "v1"
    assert not written.exists()
    assert other.refit(request(100)).loss == expected.loss
    found, wanted = (scores_of(tmp_path / name / "test/reward/v1", pairs) for name in ("other", "good"))
    assert all(torch.equal(*sides) for sides in zip(found, wanted, strict=True))
    assert [path.name for path in written.parent.iterdir()] == ["v1"]


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


def refitted(tmp_path, strategy, zero_stage=0, groups=(), dtype="float32", micro_batch_tokens=16384, **settings):
    """Scores of some pairs by a model refitted by ``strategy``, and the refit's report."""
    correction = {"strategy": strategy} | ({strategy: settings} if settings else {})
    train = random_pairs(120, seed=1)
    quick = TRAINING | {"num_epochs": 1, "learning_rate": 1e-3, "micro_batch_tokens": micro_batch_tokens}
    refitter = make_refitter(tmp_path, train, correction=correction, training=quick, zero_stage=zero_stage, dtype=dtype)
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


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "float32"), (1, "float32"), (0, "bfloat16")])
def test_a_preconditioned_metarm_trains_in_every_precision_and_eta_0_is_the_plain_refit(tmp_path, zero_stage, dtype):
    plain, _ = refitted(tmp_path / "plain", "refit", zero_stage, dtype=dtype)
    settings = {"groups": groups_of(20), "dtype": dtype, "step": "preconditioned"}
    still, _ = refitted(tmp_path / "still", "metarm", zero_stage, **settings, eta=0.0)
    moved, report = refitted(tmp_path / "moved", "metarm", zero_stage, **settings, eta=3e-2)
    assert torch.equal(plain, still)
    assert moved.isfinite().all()
    assert (plain - moved).abs().max() > 1e-3
    assert 0.25 <= report.figures["reward_spread"] < 2 / 3


def test_metarm_does_not_depend_on_the_micro_batch_tokens_that_bound_its_passes(tmp_path, monkeypatch):
    settings = {"groups": groups_of(20), "eta": 0.3}
    whole, told = refitted(tmp_path / "whole", "metarm", **settings)
    sizes, original = [], reward_fit.group_spread
    monkeypatch.setattr(
        reward_fit, "group_spread", lambda scores, groups: sizes.append(len(groups)) or original(scores, groups)
    )
    parts, told_of_parts = refitted(tmp_path / "parts", "metarm", micro_batch_tokens=40, **settings)
    torch.testing.assert_close(parts, whole, atol=1e-3, rtol=1e-3)
    assert told_of_parts.figures["reward_spread"] == pytest.approx(told.figures["reward_spread"], rel=1e-4)
    assert max(sizes) <= 40 // 12  # of two responses with 6 tokens each


@pytest.mark.parametrize("strategy", ["metarm", "rlp_uml"])
def test_responses_that_are_all_alike_leave_the_plain_refit(tmp_path, strategy):
    plain, _ = refitted(tmp_path / "plain", "refit")
    alike = tuple((group[0], group[0]) for group in groups_of(20))
    found, report = refitted(tmp_path / "alike", strategy, groups=alike)
    assert torch.equal(plain, found)
    assert report.figures == {}


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_ensembles_members_differ_by_their_seed_and_the_first_is_the_single_model(tmp_path):
    train, quick = random_pairs(120, seed=1), TRAINING | {"num_epochs": 1, "batch_size": 16}
    single = make_refitter(tmp_path / "one", train, training=quick).fit_first()
    several = make_refitter(tmp_path / "three", train, training=quick, num_members=3).fit_first()
    assert sorted(folder.name for folder in several.path.iterdir()) == ["member-0", "member-1", "member-2"]
    first, second, third = (tensors_of(several.path / f"member-{number}") for number in range(3))
    assert are_equal(first, tensors_of(single.path))
    assert not are_equal(first, second)
    assert not are_equal(second, third)
    heldout, accuracies = random_pairs(200, seed=99), []
    for number in range(3):
        chosen, rejected = scores_of(several.path / f"member-{number}", heldout)
        accuracies.append(float((chosen > rejected).float().mean()))
    assert several.heldout_accuracy == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_members_that_start_from_the_sft_model_have_heads_of_their_own(tmp_path):
    still = TRAINING | {"learning_rate": 1e-12, "num_epochs": 1}
    correction = {"rm_init": "sft"}
    refitter = make_refitter(tmp_path, random_pairs(70, seed=1), correction=correction, training=still, num_members=2)
    folder = refitter.refit(request(70)).path
    first, second = (tensors_of(folder / f"member-{number}") for number in range(2))
    assert (first["score.weight"] - second["score.weight"]).abs().max() > 0.01
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=0)


def test_each_member_is_the_successor_of_its_own_predecessor(tmp_path):
    still = TRAINING | {"learning_rate": 1e-12, "num_epochs": 1}
    train = random_pairs(70, seed=1)
    refitter = make_refitter(tmp_path, train, correction={"rm_init": "previous"}, training=still, num_members=2)
    live = tmp_path / "test" / "reward" / "v4"
    for number in range(2):
        save_reward_model(live / f"member-{number}", seed=8 + number)
    report = refitter.refit(request(70, version=5))
    for name in ("member-0", "member-1"):
        found, expected = scores_of(report.path / name, train), scores_of(live / name, train)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


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


def serve(tmp_path, folder, name="server", **reward):
    config = run_config(tmp_path / name, reward={"num_calibration": 33, **reward}, pools={"reward": {"batch_size": 16}})
    save_pairs(config, random_pairs(40, seed=1))
    server = RewardServer(config, str(folder))
    server.start()
    return server


def member_scores(folders, sequences):
    """(standardised scores [K, N], standard deviations [K]) from the folders."""
    scaled, deviations = [], []
    for folder in folders:
        model = load_reward_model(folder, dtype="float32", trust_remote_code=False)
        with torch.no_grad():
            calibrating, scores = (
                last_token_scores(model, pad_batch(each, EOS)).double().numpy()
                for each in (calibration_set(), sequences)
            )
        scaled.append((scores - calibrating.mean()) / calibrating.std())
        deviations.append(calibrating.std())
    return np.stack(scaled), np.array(deviations)


@pytest.mark.parametrize("scale", ["none", "calibration_std"])
def test_an_ensembles_score_is_the_aggregate_of_its_members_brought_to_one_scale(tmp_path, scale):
    folders = [save_reward_model(tmp_path / "live" / f"member-{number}", seed=4 + number) for number in range(3)]
    model = load_reward_model(folders[1], dtype="float32", trust_remote_code=False)
    with torch.no_grad():  # of a scale of its own, which must not count
        model.network.score.weight.mul_(7)
    save_model(model, build_tokenizer(), folders[1])
    sequences = [pair.chosen for pair in random_pairs(20, seed=5)]
    scaled, deviations = member_scores(folders, sequences)
    common = 1.0 if scale == "calibration_std" else deviations.mean()
    variances = ((scaled - scaled.mean(axis=0)) ** 2).sum(axis=0) / 2
    expected = {
        "mean": scaled.mean(axis=0),
        "worst": scaled.min(axis=0),
        "mean_minus_variance": scaled.mean(axis=0) - 0.3 * variances,
    }
    for rule, values in expected.items():
        ensemble = {"num_members": 3, "aggregate": rule, "variance_coefficient": 0.3}
        server = serve(tmp_path, tmp_path / "live", rule, scale=scale, ensemble=ensemble)
        np.testing.assert_allclose(server.score(sequences), common * values, rtol=1e-4, atol=1e-4)


def test_a_single_member_is_served_as_the_model_alone_to_the_last_bit(tmp_path):
    sequences = [pair.chosen for pair in random_pairs(20, seed=5)]
    save_reward_model(tmp_path / "several" / "member-0")
    alone = serve(tmp_path, save_reward_model(tmp_path / "rm"), "alone").score(sequences)
    np.testing.assert_array_equal(serve(tmp_path, tmp_path / "several", "member").score(sequences), alone)


def test_a_staged_ensemble_is_live_after_the_commit_with_its_members_mean_calibration(tmp_path):
    ensemble = {"num_members": 2, "aggregate": "worst"}
    for folder, seed in (("live", 4), ("next", 8)):
        for number in range(2):
            save_reward_model(tmp_path / folder / f"member-{number}", seed=seed + number)
    server = serve(tmp_path, tmp_path / "live", ensemble=ensemble)
    found = server.stage("snapshot-5", RefitReport(1, tmp_path / "next", 0.0, 0.0, 0.0))
    sequences = [pair.chosen for pair in random_pairs(20, seed=5)]
    scaled, deviations = member_scores([tmp_path / "next" / f"member-{number}" for number in range(2)], sequences)
    assert found.std == pytest.approx(deviations.mean(), rel=1e-4)
    server.commit("snapshot-5", 1)
    np.testing.assert_allclose(server.score(sequences), deviations.mean() * scaled.min(axis=0), rtol=1e-4, atol=1e-4)


def test_words_that_pairs_reward_are_worth_more(tmp_path):
    refitter = make_refitter(tmp_path, random_pairs(600, seed=1))
    refitter.fit_first()
    good, bad = (
        Pair("", *[replace(random_pairs(1, seed=3)[0].chosen, response_ids=(word,) * 4 + (EOS,))] * 2)
        for word in (GOOD, BAD)
    )
    chosen, _ = scores_of(tmp_path / "test" / "stages" / "reward", [good, bad])
    assert chosen[0] > chosen[1]
