"""The publisher against fakes in process: what it calls, when it alarms, which files it keeps."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from ocrm_ray.config import Probe
from ocrm_ray.errors import StaleWeightsError
from ocrm_ray.records import PolicyWeights, PublishReport, Sequence
from ocrm_ray.weight_publisher import WeightPublisher, probe_position

SEQUENCES = (
    Sequence(prompt_ids=(1, 2), response_ids=(3, 4, 0), has_eos=True),
    Sequence(prompt_ids=(1, 2), response_ids=(5, 6), has_eos=False),
)


class Trainer:
    """Version v gives every token the log-prob -v; ``noise`` is the trainer's constant difference to engines."""

    def __init__(self, calls: list[str], noise: float = 0.0) -> None:
        self.version = 0
        self.calls = calls
        self.noise = noise
        self.files: set[int] = set()

    async def export_weights(self) -> PolicyWeights:
        self.calls.append(f"export {self.version}")
        self.files.add(self.version)
        return PolicyWeights(version=self.version, path=Path(f"weights-{self.version}"), num_bytes=7)

    async def send_weights(self, weights: PolicyWeights) -> None:
        self.calls.append(f"send {weights.version}")

    async def release_weights(self, weights: PolicyWeights) -> None:
        self.files.remove(weights.version)

    async def logprobs(self, sequences):
        return [
            np.full(len(sequence.response_ids), -self.version - self.noise, dtype=np.float32) for sequence in sequences
        ]


class Engine:
    """``lost``: how many loads to come do nothing. ``stale_at``: adds 1 at one position of every sequence."""

    def __init__(self, calls: list[str]) -> None:
        self.version = 0
        self.calls = calls
        self.lost = 0
        self.stale_at: int | None = None
        self.broken_value = 0.0
        self.second_engine_off = 0.0

    async def load_weights(self, weights: PolicyWeights) -> PublishReport:
        self.calls.append(f"load {weights.version}")
        if self.lost:
            self.lost -= 1
        else:
            self.version = weights.version
        return PublishReport(version=weights.version, num_bytes=weights.num_bytes, seconds=0.25, pause_s=0.125)

    async def score(self, sequences):
        self.calls.append("score")
        scores = [np.full(len(sequence.response_ids), -self.version, dtype=np.float32) for sequence in sequences]
        for sequence, score in zip(sequences, scores, strict=True):
            score += self.broken_value
            if self.stale_at is not None:
                score[probe_position(sequence) if self.stale_at < 0 else self.stale_at] += 1.0
        return scores + [score + self.second_engine_off for score in scores]


class World:
    def __init__(self, noise: float = 0.0, **probe: float) -> None:
        self.calls: list[str] = []
        self.events: list[tuple[str, dict]] = []
        self.trainer = Trainer(self.calls, noise)
        self.engine = Engine(self.calls)
        self.publisher = WeightPublisher(
            self.engine, self.trainer, Probe(**probe), lambda event, **fields: self.events.append((event, fields))
        )

    async def update_and_publish(self) -> PublishReport:
        self.trainer.version += 1
        return await self.publisher.put_live(await self.publisher.export())

    def probes(self) -> list[dict]:
        return [fields for event, fields in self.events if event == "probe_measured"]


def _world(noise: float = 0.0, **probe: float) -> World:
    world = World(noise, **probe)
    asyncio.run(world.publisher.start(SEQUENCES))
    return world


def test_a_publish_exports_then_loads_then_probes():
    world = _world()
    asyncio.run(world.update_and_publish())
    assert world.calls == ["score", "export 1", "load 1", "send 1", "score"]


def test_a_probe_compares_the_exported_version_though_the_trainer_has_gone_on():
    world = _world()

    async def publish_beside_an_update() -> None:
        world.trainer.version = 1
        exported = await world.publisher.export()
        world.trainer.version = 2
        await world.publisher.put_live(exported)

    asyncio.run(publish_beside_an_update())
    assert [probe["gap"] for probe in world.probes()] == [0.0]


def test_while_one_version_is_loaded_and_the_next_exported_no_third_is_kept():
    world = _world()

    async def export_during_loads() -> None:
        exported = None
        for version in range(1, 5):
            world.trainer.version = version
            newer = await world.publisher.export()
            assert len(world.trainer.files) <= 2
            if exported is not None:
                await world.publisher.put_live(exported)
            exported = newer

    asyncio.run(export_during_loads())


def test_the_first_publish_and_every_nth_are_probed():
    world = _world(every=3)
    for _ in range(7):
        asyncio.run(world.update_and_publish())
    assert [probe["policy_version"] for probe in world.probes()] == [1, 4, 7]


def test_a_publish_is_reported_with_version_bytes_and_pause():
    world = _world()
    report = asyncio.run(world.update_and_publish())
    event, fields = world.events[0]
    assert event == "weights_published"
    assert (fields["policy_version"], fields["bytes"], fields["pause_s"]) == (1, 7, 0.125)
    assert fields["seconds"] == report.seconds
    assert report.pause_s == 0.125


def test_a_load_that_was_lost_once_is_repeated_without_an_error():
    world = _world()
    world.engine.lost = 1
    asyncio.run(world.update_and_publish())
    assert world.engine.version == 1
    assert [probe["gap"] for probe in world.probes()] == [1.0, 0.0]


def test_a_load_that_is_lost_again_raises_and_names_gap_bound_and_version():
    world = _world(floor=0.01)
    world.engine.lost = 2
    with pytest.raises(StaleWeightsError, match=r"version 1 .*gap 1, bound 0\.01"):
        asyncio.run(world.update_and_publish())


def test_a_gap_of_the_cached_path_alone_is_not_diluted_by_the_other_tokens():
    world = _world(floor=0.9)
    world.engine.stale_at = -1
    with pytest.raises(StaleWeightsError):
        asyncio.run(world.update_and_publish())


def test_the_same_gap_elsewhere_stays_under_the_bound_of_the_mean():
    world = _world(floor=0.9)
    world.engine.stale_at = 0
    sequence = Sequence(prompt_ids=(1,), response_ids=(3, 4, 5), has_eos=False)
    asyncio.run(world.publisher.start([sequence]))
    asyncio.run(world.update_and_publish())
    assert world.probes()[-1]["gap"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gap_that_is_no_number_is_over_every_bound(value):
    world = _world()
    world.engine.broken_value = value
    with pytest.raises(StaleWeightsError):
        asyncio.run(world.update_and_publish())


def test_the_bound_is_the_baseline_gap_times_the_factor():
    world = _world(noise=0.25, factor=3.0)
    asyncio.run(world.update_and_publish())
    assert world.probes() == [{"policy_version": 1, "gap": 0.25, "bound": 0.75}]


def test_the_probe_reads_the_last_token_before_eos():
    assert [probe_position(sequence) for sequence in SEQUENCES] == [1, 1]
    assert probe_position(Sequence(prompt_ids=(1,), response_ids=(0,), has_eos=True)) == 0


def test_only_the_latest_file_stays_when_nobody_holds_one():
    world = _world()
    for _ in range(3):
        asyncio.run(world.update_and_publish())
    assert world.trainer.files == {3}


def test_a_held_file_outlives_later_publishes_until_its_last_holder_releases_it():
    world = _world()
    asyncio.run(world.update_and_publish())
    assert world.publisher.hold().version == world.publisher.hold().version == 1
    asyncio.run(world.update_and_publish())
    asyncio.run(world.publisher.release(1))
    asyncio.run(world.update_and_publish())
    assert world.trainer.files == {1, 3}
    asyncio.run(world.publisher.release(1))
    assert world.trainer.files == {3}


def test_releasing_the_latest_version_keeps_its_file():
    world = _world()
    asyncio.run(world.update_and_publish())
    world.publisher.hold()
    asyncio.run(world.publisher.release(1))
    assert world.trainer.files == {1}


def test_a_second_engine_that_went_stale_ends_the_run():
    world = World()
    asyncio.run(world.publisher.start(SEQUENCES))
    world.engine.second_engine_off = 0.5
    with pytest.raises(StaleWeightsError):
        asyncio.run(world.update_and_publish())
