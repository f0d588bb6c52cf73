"""What the latest rollouts give a refit."""

import asyncio
import pickle
from typing import Any

import numpy as np
from fakes import FakeEvaluator, tiny_run

from ocrm_ray.on_policy import OnPolicyResponses
from ocrm_ray.records import Prompt, Rollout, Sample, Scores, Sequence
from ocrm_ray.strategies import make_strategy

NONE = np.zeros(1, dtype=np.float32)


def rollout(number: int, responses: list[tuple[int, ...]], rewards: list[float] | None = None) -> Rollout:
    sequences = [Sequence((number + 1,), response, True) for response in responses]
    samples = tuple(Sample(sequence, NONE, 0, 0) for sequence in sequences)
    scores = tuple(Scores(reward, 0, NONE, 0, NONE) for reward in rewards or [0.0] * len(samples))
    return Rollout(Prompt(number, "", (number + 1,)), samples, 0, scores)


def kept(strategy: str, **keys: object) -> tuple[OnPolicyResponses, list[dict[str, Any]]]:
    config = tiny_run(**{"correction.strategy": strategy, "pairs.labels": "argmax", **keys})
    told: list[dict[str, Any]] = []
    responses = OnPolicyResponses(
        config, FakeEvaluator(), make_strategy(config.correction), lambda event, **fields: told.append(fields)
    )
    return responses, told


def test_groups_are_those_of_the_latest_prompts_alone() -> None:
    responses, _ = kept("metarm", **{"correction.rollout_prompts": 2})
    responses.add([rollout(number, [(3,), (4,)]) for number in range(5)])
    pairs, groups = asyncio.run(responses.material(1))
    assert pairs == ()
    assert [group[0].prompt_ids for group in groups] == [(4,), (5,)]


def test_a_strategy_without_rollouts_keeps_none() -> None:
    responses, _ = kept("ocrm")
    responses.add([rollout(0, [(3,), (4,)])])
    assert asyncio.run(responses.material(1)) == ((), ())


def test_the_best_of_the_largest_cluster_is_chosen_and_the_rest_rejected() -> None:
    responses, told = kept("rlp_spg")
    undecided = rollout(1, [(3,), (4,), (5,)], [0.0, 1.0, 2.0])
    responses.add([rollout(0, [(3, 1), (4, 1), (3, 2)], [0.5, 9.0, 0.7]), undecided])
    ((chosen, rejected),), _ = asyncio.run(responses.material(1))
    assert (chosen.response_ids, rejected.response_ids) == ((3, 2), (4, 1))
    assert told == [{"snapshot_version": 1, "num_prompts": 2, "num_pairs": 1}]


def test_gold_orders_fresh_pairs_and_those_of_earlier_refits_stay() -> None:
    responses, _ = kept("relabel")
    responses.add([rollout(0, [(3, 6), (7, 8)]), rollout(1, [(3,), (3,)])])
    first, _ = asyncio.run(responses.material(1))
    responses.add([rollout(2, [(9,), (3,)])])
    both, _ = asyncio.run(responses.material(2))
    assert [(chosen.response_ids, rejected.response_ids) for chosen, rejected in both] == [
        ((7, 8), (3, 6)),
        ((9,), (3,)),
    ]
    assert both[:1] == first


def test_a_refit_that_is_cut_off_while_gold_labels_takes_the_same_responses_again() -> None:
    responses, _ = kept("relabel")
    responses.add([rollout(number, [(3,), (7 + number,)]) for number in range(2)])
    states = []
    gold_of = responses.evaluator.gold_of

    async def slow(*asked: Any) -> list[float]:
        responses.add([rollout(2, [(3,), (9,)])])
        states.append(responses.state)
        return await gold_of(*asked)

    responses.evaluator.gold_of = slow  # type: ignore[method-assign]
    whole = asyncio.run(responses.material(1))
    again, _ = kept("relabel")
    again.restore(pickle.loads(pickle.dumps(states[0])))
    assert asyncio.run(again.material(1)) == whole
    assert len(whole[0]) == 2
    assert again.state == responses.state
