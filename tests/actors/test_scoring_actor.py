"""Scoring against forward passes of the networks themselves; no processes, no DeepSpeed."""

import numpy as np
import pytest
import torch
from disk_faults import files_up_to
from tiny_models import EOS, build_policy, pad_batch, random_pairs, run_config, save_pairs, save_policy

from actors import scoring
from actors.scoring import ScoringActor
from actors.weight_transport import WeightExporter
from ocrm_ray.checkpoints import ANCHOR, STATE
from ocrm_ray.networks import CausalModel, response_logprobs

PAIRS = random_pairs(11, seed=1)
SEQUENCES = [pair.chosen for pair in PAIRS]
TEMPERATURE = 0.7


@pytest.fixture
def actor(tmp_path):
    config = run_config(
        tmp_path,
        rollout={"temperature": TEMPERATURE},
        pairs={"temperature": 1.3},
        pools={"scoring": {"batch_size": 4}},
    )
    save_pairs(config, PAIRS)
    actor = ScoringActor(config, save_policy(tmp_path / "sft", tie_word_embeddings=True))
    actor.start()
    return actor


def moved_policy():
    """The policy after something happened to it."""
    model = build_policy(tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def published(tmp_path, version=3):
    tensors = moved_policy().state_dict()
    return WeightExporter(tmp_path / "exports", tensors, checksum=True).export(version, [tensors])


def expected_rows(model, sequences, temperature):
    with torch.no_grad():
        return [response_logprobs(CausalModel(model), pad_batch([s], EOS), temperature)[0].numpy() for s in sequences]


def assert_rows_close(rows, expected):
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row, other, atol=1e-5)


def count_forwards(monkeypatch):
    calls = []
    original = scoring.table_logprobs
    monkeypatch.setattr(scoring, "table_logprobs", lambda *args: calls.append(1) or original(*args))
    return calls


def test_first_anchor_is_the_sft_model_and_costs_no_second_forward(actor, monkeypatch):
    calls = count_forwards(monkeypatch)
    anchor, sft = actor.score(SEQUENCES)
    assert len(calls) == 1
    assert_rows_close(sft, expected_rows(build_policy(tie_word_embeddings=True), SEQUENCES, TEMPERATURE))
    assert_rows_close(anchor, sft)


def test_staged_anchor_scores_beside_the_live_one_until_the_commit(actor, tmp_path):
    actor.stage_anchor("snapshot-3", published(tmp_path))
    moved = expected_rows(moved_policy(), SEQUENCES, TEMPERATURE)
    live, sft = actor.score(SEQUENCES)
    staged, _ = actor.score(SEQUENCES, ("snapshot-3", "sft"))
    assert_rows_close(live, sft)
    assert_rows_close(staged, moved)
    actor.commit("snapshot-3", 3)
    anchor, sft_after = actor.score(SEQUENCES)
    assert_rows_close(anchor, moved)
    assert_rows_close(sft_after, sft)
    assert_rows_close(actor.score(SEQUENCES, ("snapshot-3", "sft"))[0], moved)


def test_commit_again_or_of_nothing_staged_changes_nothing(actor, tmp_path):
    actor.stage_anchor("snapshot-3", published(tmp_path))
    actor.commit("snapshot-3", 3)
    before, _ = actor.score(SEQUENCES)
    actor.stage_anchor("snapshot-9", published(tmp_path, version=9))
    actor.commit("snapshot-3", 3)
    actor.score(SEQUENCES, ("snapshot-9",))  # still staged
    actor.commit("snapshot-10", 3)
    assert_rows_close(actor.score(SEQUENCES)[0], before)


def test_an_anchor_that_the_disk_refuses_is_no_model_folder(actor, tmp_path):
    actor.stage_anchor("snapshot-3", published(tmp_path))
    actor.commit("snapshot-3", 3)
    actor.capture()
    with files_up_to(1000), pytest.raises(Exception, match="File too large"):
        actor.write_anchor(tmp_path, 3)
    assert not (tmp_path / STATE / ANCHOR).exists()


def test_unknown_slot_is_refused(actor):
    with pytest.raises(AssertionError, match="no anchor in slot"):
        actor.score(SEQUENCES, ("snapshot-99",))


def test_pairs_are_summed_under_the_snapshot_at_the_rollout_temperature(actor, tmp_path):
    weights = published(tmp_path)
    actor.load_snapshot(weights)
    weights.path.unlink()
    indices = np.array([7, 2, 5])
    model = moved_policy()
    expected = [
        [row.sum() for row in expected_rows(model, (PAIRS[index].chosen, PAIRS[index].rejected), TEMPERATURE)]
        for index in indices
    ]
    logprobs = actor.pair_logprobs(weights, indices)
    assert logprobs.dtype == np.float32
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5)


def test_snapshot_that_is_held_becomes_the_anchor_without_its_file(actor, tmp_path):
    weights = published(tmp_path)
    actor.load_snapshot(weights)
    weights.path.unlink()
    actor.stage_anchor("snapshot-3", weights)
    actor.commit("snapshot-3", 3)
    assert_rows_close(actor.score(SEQUENCES)[0], expected_rows(moved_policy(), SEQUENCES, TEMPERATURE))


def test_pairs_under_who_wrote_them_are_taken_at_their_own_temperature(actor):
    logprobs = actor.pair_logprobs(None, np.arange(11))
    chosen = expected_rows(build_policy(tie_word_embeddings=True), SEQUENCES, 1.3)
    np.testing.assert_allclose(logprobs[:, 0], [row.sum() for row in chosen], rtol=1e-5)


def test_pairs_written_by_another_model_are_scored_under_it(tmp_path):
    from tiny_models import build_tokenizer

    from ocrm_ray.networks import save_model

    save_model(moved_policy(), build_tokenizer(), tmp_path / "writer")
    config = run_config(tmp_path, pairs={"behaviour": str(tmp_path / "writer")})
    save_pairs(config, PAIRS)
    actor = ScoringActor(config, save_policy(tmp_path / "sft"))
    actor.start()
    expected = [row.sum() for row in expected_rows(moved_policy(), SEQUENCES, 1.0)]
    np.testing.assert_allclose(actor.pair_logprobs(None, np.arange(11))[:, 0], expected, rtol=1e-5)


def test_alignments_are_those_of_full_vocabulary_float64_arithmetic_under_the_snapshot(actor, tmp_path):
    weights, indices = published(tmp_path), np.array([7, 2, 5, 0, 10])
    model, expected = moved_policy().double(), []
    for sequence in (side for index in indices for side in (PAIRS[index].chosen, PAIRS[index].rejected)):
        tokens = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, len(sequence.prompt_ids) - 1 : -1]
        probabilities = torch.softmax(logits / TEMPERATURE, dim=-1)
        said = probabilities.gather(1, torch.tensor(sequence.response_ids)[:, None])[:, 0]
        expected.append(float((said.log() - probabilities.square().sum(dim=-1).log()).mean()))
    alignments = actor.pair_alignments(weights, indices)
    assert alignments.dtype == np.float32
    np.testing.assert_allclose(alignments, np.reshape(expected, (5, 2)), rtol=1e-5, atol=1e-5)
