import numpy as np
import pytest
import torch
from tiny_models import random_pairs

from ocrm_ray.reward_learning import (
    calibration_sequences,
    cosine_factor,
    epoch_batches,
    pair_accuracy,
    pair_lengths,
    pair_rows,
    pair_table,
    weighted_pair_loss,
)


def test_a_batch_of_pairs_is_their_chosen_then_their_rejected_responses():
    pairs = random_pairs(4, seed=1)
    batch = pair_table(pairs, pad_id=0, share_prompts=False).batch(pair_rows(np.array([3, 1])))
    expected = [pairs[3].chosen, pairs[1].chosen, pairs[3].rejected, pairs[1].rejected]
    tokens = batch.tokens.flatten().tolist()
    for start, sequence in zip(batch.places[:, 0].tolist(), expected, strict=True):
        row = tokens[start - len(sequence.prompt_ids) : start + len(sequence.response_ids)]
        assert tuple(row) == sequence.prompt_ids + sequence.response_ids


def test_length_of_a_pair_counts_a_shared_prompt_once():
    pair = random_pairs(1, seed=2)
    expected = len(pair[0].chosen.prompt_ids + pair[0].chosen.response_ids + pair[0].rejected.response_ids)
    assert pair_lengths(pair_table(pair, pad_id=0, share_prompts=True)).tolist() == [expected]


def test_length_of_a_pair_is_that_of_both_its_sequences():
    pairs = random_pairs(5, seed=2)
    expected = [sum(len(s.prompt_ids + s.response_ids) for s in (pair.chosen, pair.rejected)) for pair in pairs]
    assert pair_lengths(pair_table(pairs, pad_id=0, share_prompts=False)).tolist() == expected


@pytest.mark.parametrize("weighted", [True, False])
def test_parts_of_a_batch_sum_to_its_mean_loss(weighted):
    scores = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    weights = torch.rand(6) if weighted else None
    expected = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1])
    expected = (expected if weights is None else weights * expected).mean()
    parts = [
        weighted_pair_loss(scores[cut].T.flatten(), None if weights is None else weights[cut], 6)
        for cut in (slice(0, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), expected)


def test_each_epoch_sees_every_pair_once_in_another_order():
    batches = epoch_batches(10, 4, 2, seed=0)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert not np.array_equal(first, second)


def test_order_depends_on_the_seed_alone():
    orders = [np.concatenate(epoch_batches(50, 8, 1, seed)) for seed in (1, 1, 2)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_learning_rate_is_half_a_cosine():
    assert [cosine_factor(step, 4) for step in range(4)] == pytest.approx(
        [1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]
    )


def test_accuracy_counts_ties_half():
    assert pair_accuracy(torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 5.0, 4.0])) == pytest.approx(2.5 / 4)


def test_calibration_set_interleaves_the_first_pairs():
    pairs = random_pairs(3, seed=4)
    expected = [pairs[0].chosen, pairs[0].rejected, pairs[1].chosen]
    assert calibration_sequences(pairs, 3) == expected
    assert len(calibration_sequences(pairs, 100)) == 6
