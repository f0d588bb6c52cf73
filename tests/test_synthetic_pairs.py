"""Pairs from clustered samples: Kuhn's greedy clustering, and RLP-SPG's choice by enumeration."""

from collections import Counter

import numpy as np
import pytest

from ocrm_ray.synthetic_pairs import clusters, embedding_clusters, synthetic_pair, text_clusters


def test_item_joins_the_first_cluster_whose_first_item_it_matches():
    positions = [0.0, 0.9, 1.8, 0.5, 2.6, -0.9]  # 0.9 is near 1.8, but does not speak for its cluster; nor does 0.5
    found = clusters(6, lambda first, item: abs(positions[first] - positions[item]) <= 1)
    assert found.tolist() == [0, 0, 1, 0, 1, 0]


def test_item_near_two_clusters_joins_the_older():
    positions = [0.0, 1.5, 0.75]
    assert clusters(3, lambda first, item: abs(positions[first] - positions[item]) <= 1).tolist() == [0, 1, 0]


def test_only_first_items_are_compared_and_none_twice():
    asked = []
    clusters(5, lambda first, item: asked.append((first, item)) or first % 2 == item % 2)
    assert asked == [(0, 1), (0, 2), (0, 3), (1, 3), (0, 4)]


def test_clusters_of_an_equivalence_are_its_classes():
    values = np.random.default_rng(0).integers(0, 6, 40)
    found = clusters(40, lambda first, item: values[first] == values[item])
    assert [[a == b for b in found] for a in found] == [[a == b for b in values] for a in values]


def test_no_items_have_no_clusters():
    assert clusters(0, lambda first, item: True).tolist() == []


def test_texts_cluster_where_they_are_identical():
    assert text_clusters(["yes", "no", "yes", "Yes", "no", ""]).tolist() == [0, 1, 0, 2, 1, 3]


def test_embeddings_cluster_by_the_cosine():
    angles = np.radians([0, 25, 35, 50, 180])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert embedding_clusters(embeddings, float(np.cos(np.radians(30)))).tolist() == [0, 0, 1, 1, 2]
    assert embedding_clusters(embeddings, -1.1).tolist() == [0] * 5


def pair(cluster_of, rewards, confidence=0.5, seed=0):
    arrays = np.array(cluster_of), np.array(rewards, dtype=np.float32)
    return synthetic_pair(*arrays, confidence, np.random.default_rng(seed))


def test_chosen_is_the_best_of_the_largest_cluster_even_where_an_outsider_scores_more():
    assert pair([0, 1, 1, 1, 0, 2][:5], [9.0, -3.0, -1.0, -2.0, 8.0])[0] == 2


def test_rejected_is_drawn_uniformly_from_all_outside_the_largest_cluster():
    drawn = Counter(pair([0, 1, 1, 1, 0, 2, 1], [9.0, 0, 1, 0, 8.0, 7.0, 0], seed=seed)[1] for seed in range(3000))
    assert set(drawn) == {0, 4, 5}
    assert all(abs(count - 1000) < 5 * np.sqrt(3000 * 2 / 9) for count in drawn.values())


@pytest.mark.parametrize(("confidence", "is_kept"), [(0.6, True), (0.61, False), (0.0, True), (1.0, False)])
def test_prompt_is_kept_where_the_largest_cluster_reaches_the_confidence(confidence: float, is_kept: bool):
    assert (pair([0, 0, 0, 1, 2], [0.0] * 5, confidence) is not None) == is_kept


def test_samples_that_all_agree_give_no_pair():
    assert pair([0, 0, 0], [1.0, 2.0, 3.0], 0.0) is None


def test_samples_that_all_differ_give_no_pair():
    assert pair([0, 1], [1.0, 2.0]) is None
    assert pair([0, 1, 2], [1.0, 2.0, 3.0], 0.0) is None


def test_of_equally_large_clusters_the_first_is_taken():
    assert pair([0, 1, 1, 0], [0.0, 5.0, 6.0, 1.0])[0] == 3


def test_same_generator_state_gives_the_same_pair():
    sample = [0, 1, 2, 3, 0, 0, 0, 4], list(range(8))
    assert len({pair(*sample, seed=7) for _ in range(5)}) == 1
    assert len({pair(*sample, seed=seed) for seed in range(20)}) > 1
