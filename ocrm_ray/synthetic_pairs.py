"""Preference pairs from the policy's own samples: what most of them say beats the rest (RLP-SPG, arXiv 2403.19279).

Samples of a prompt are clustered by meaning (Kuhn et al., arXiv 2302.09664). Agreement is no proof of quality: the
paper's pairs are right 59 % of the time.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ocrm_ray.records import FloatArray, IntArray


def clusters(num_items: int, same: Callable[[int, int], bool]) -> IntArray:
    """Cluster [n] of each item, numbered as they begin: that of the first cluster whose first item is the ``same``.

    ``same(first, item)``: whether two items mean the same; asked at most once of two items.
    """
    firsts: list[int] = []
    cluster_of = np.empty(num_items, dtype=np.int64)
    for item in range(num_items):
        matches = (cluster for cluster, first in enumerate(firsts) if same(first, item))
        cluster_of[item] = next(matches, len(firsts))
        if cluster_of[item] == len(firsts):
            firsts.append(item)
    return cluster_of


def text_clusters(texts: Sequence[str]) -> IntArray:
    """Clusters [n] of identical texts."""
    return clusters(len(texts), lambda first, item: texts[first] == texts[item])


def embedding_clusters(embeddings: FloatArray, threshold: float) -> IntArray:
    """Clusters [n] of items whose ``embeddings`` [n, d], of norm 1, have a cosine of at least ``threshold``."""
    cosines = embeddings @ embeddings.T
    return clusters(len(embeddings), lambda first, item: bool(cosines[first, item] >= threshold))


def synthetic_pair(
    cluster_of: IntArray, rewards: FloatArray, confidence: float, rng: np.random.Generator
) -> tuple[int, int] | None:
    """Indices (chosen, rejected) among n samples of one prompt, from their clusters and rewards [n].

    Chosen is the best rewarded of the largest cluster (of equally large ones, the first), rejected any sample outside.
    None where that cluster holds less than a share ``confidence`` of the samples, but one (nothing agrees), or all.
    """
    assert cluster_of.shape == rewards.shape
    in_largest = cluster_of == np.bincount(cluster_of).argmax()
    if in_largest.all() or in_largest.sum() == 1 or in_largest.mean() < confidence:
        return None
    chosen = np.where(in_largest, rewards, -np.inf).argmax()
    return int(chosen), int(rng.choice(np.flatnonzero(~in_largest)))
