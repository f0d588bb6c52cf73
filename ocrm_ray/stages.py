"""The stages before RL: world -> data -> SFT -> pairs -> labels -> reward model -> log-probs of the pairs.

Each leaves its result in a folder of its own and is skipped while that is there and its inputs are unchanged, or
where the configuration names a ready one. What needs a network is done by the ``Cluster``.
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocrm_ray.config import DataFile, RunConfig
from ocrm_ray.data_files import Row, bad_rows, read_rows
from ocrm_ray.errors import RunError
from ocrm_ray.networks import load_tokenizer
from ocrm_ray.pair_sampling import sample_pairs
from ocrm_ray.pools import Cluster, Show
from ocrm_ray.praise import write_world
from ocrm_ray.preferences import load_pairs, split_pairs, write_pairs
from ocrm_ray.progress import ProgressState
from ocrm_ray.prompts import load_prompts, read_prompts, split_prompts, write_prompts
from ocrm_ray.records import FloatArray, Prompt
from ocrm_ray.stage_settings import stage_settings
from ocrm_ray.strategies import make_strategy
from ocrm_ray.whole_files import flushed_sizes, write_whole

logger = logging.getLogger(__name__)

MARKER = "stage.json"
_CHAIN = ("world", "data", "sft", "pairs")
"""Each is made from the one before; what comes behind them, from the last."""
NUM_TOLD_ROWS = 10
"""Bad rows that a stage's marker tells in words."""


def fingerprint(inputs: Mapping[str, object]) -> str:
    """SHA-256 of what a result depends on, as canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def file_fingerprint(name: str) -> str:
    """Of a data file its content, of a model folder its files' names, sizes and times; a Hub name stands for itself."""
    path = Path(name)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_dir():
        stats = {str(file.relative_to(path)): file.stat() for file in sorted(path.rglob("*")) if file.is_file()}
        return fingerprint({file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()})
    return name


@dataclass(frozen=True)
class StageFolder:
    """One stage's result, made from ``inputs``."""

    path: Path
    inputs: Mapping[str, object]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @property
    def facts(self) -> dict[str, Any]:
        """What ``finish`` wrote; {} before, and where it cannot be understood."""
        try:
            return dict(json.loads((self.path / MARKER).read_bytes()))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return {}

    @property
    def is_done(self) -> bool:
        """Whether the result is there, every file as large as it was, and made from these inputs."""
        facts = self.facts
        is_same = facts.get("fingerprint") == self.fingerprint
        return is_same and facts.get("files", {}).items() <= flushed_sizes(self.path).items()

    def begin(self) -> None:
        """Empty the folder, its marker first."""
        if self.path.exists():
            (self.path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)

    def finish(self, **facts: object) -> None:
        """Mark the result complete, once all of it is on the disk."""
        told = {"fingerprint": self.fingerprint, **facts, "files": flushed_sizes(self.path)}
        write_whole(self.path / MARKER, [json.dumps(told, indent=2, default=str) + "\n"])


@dataclass(frozen=True)
class StagePaths:
    """Where the models and data of a run are: stage results, or the ready ones of the configuration."""

    root: Path
    policy_base: str
    """What SFT starts from."""
    sft: str
    reward_base: str
    """What the first reward model starts from."""
    reward: str


def stage_paths(config: RunConfig) -> StagePaths:
    """The paths that follow from a configuration; nothing needs to exist yet."""
    root, world = config.stage_root, config.world is not None
    num_members = config.reward.ensemble.num_members
    sft = config.sft.ready or str(root / "sft")
    return StagePaths(
        root=root,
        policy_base=str(root / "world" / "policy") if world else (config.sft.base or sft),
        sft=sft,
        reward_base=str(root / "world" / "reward") if world else (config.reward.base or sft),
        reward=config.reward.ready or str(root / ("reward" if num_members == 1 else f"reward-{num_members}")),
    )


@dataclass
class Stages:
    """Runs what is missing, in order; ``show`` receives progress."""

    config: RunConfig
    cluster: Cluster
    show: Show

    def __post_init__(self) -> None:
        self.paths = stage_paths(self.config)
        self.folder = functools.cache(lambda name: StageFolder(self.paths.root / name, self._inputs(name)))

    async def run(self) -> None:
        """All stages, up to and including the first reward model and, where ratios are needed, its log-probs."""
        config = self.config
        stages: list[tuple[str, bool, Callable[[Path], Awaitable[Mapping[str, object]]]]] = [
            ("world", config.world is not None, self._world),
            ("data", True, self._data),
            ("sft", config.sft.ready is None, lambda _: self.cluster.train_sft(self.show)),
            ("pairs", True, self._pairs),
            (Path(self.paths.reward).name, config.reward.ready is None, lambda _: self.cluster.train_reward(self.show)),
            ("logprobs", self._needs_logprobs, self._logprobs),
        ]
        for name, is_needed, work in stages:
            folder = self.folder(name)
            if is_needed and not folder.is_done:
                self.show(ProgressState(stage=name))
                self._forget_behind(name)
                folder.begin()
                facts = await work(folder.path)
                folder.finish(**facts)
                logger.info("stage %s is done: %s", name, facts)

    def _forget_behind(self, name: str) -> None:
        """What was made from a stage's old result is not done any more: sampled again, pairs are others."""
        if name in _CHAIN:
            for behind in (*_CHAIN[_CHAIN.index(name) + 1 :], "reward*", "logprobs"):
                for marker in self.paths.root.glob(f"{behind}/{MARKER}"):
                    marker.unlink()

    @property
    def _needs_logprobs(self) -> bool:
        return self.config.policy.is_offline or make_strategy(self.config.correction).needs_ratios

    def _inputs(self, name: str) -> dict[str, object]:
        """What a stage's result depends on: its own settings, the files it reads, and the stages before it."""
        config = self.config
        stage = name if name in (*_CHAIN, "logprobs") else "reward"
        inputs: dict[str, object] = {"settings": stage_settings(config, stage)}
        match stage:
            case "world":
                return inputs
            case "data":
                prompts = config.data.prompts
                read = file_fingerprint(prompts.path) if prompts else self.folder("world").fingerprint
                return {**inputs, "read": read, "tokenizer": self._sft_source()}
            case "sft":
                return {**inputs, "base": self._sft_source(), "data": self.folder("data").fingerprint}
            case "pairs":
                ready = file_fingerprint(config.pairs.ready.path) if config.pairs.ready else None
                return {**inputs, "read": ready, "sft": self.folder("sft").fingerprint}
            case "reward":
                model = file_fingerprint(config.reward.base) if config.reward.base else None
            case _:
                model = file_fingerprint(config.pairs.behaviour)
        return {**inputs, "model": model, "pairs": self.folder("pairs").fingerprint}

    def _sft_source(self) -> str:
        is_world = self.config.world is not None
        return self.folder("world").fingerprint if is_world else file_fingerprint(self.paths.policy_base)

    async def _world(self, folder: Path) -> dict[str, object]:
        assert self.config.world is not None
        write_world(folder, self.config.world, self.config.seed)
        return {}

    async def _data(self, folder: Path) -> dict[str, object]:
        data, world = self.config.data, self.config.world
        source = data.prompts or DataFile(path=str(self.paths.root / "world" / "prompts.jsonl"))
        bad = bad_rows(source)
        rows = self._read("data", source, "data.prompts", bad)
        prompts, counts = load_prompts(data, rows, self._tokenizer(), bad)
        # the world numbers its prompts in random order already, and promises the last ones
        training, heldout = split_prompts(prompts, data.num_heldout, None if world else self.config.seed)
        write_prompts(folder / "prompts.jsonl", training)
        write_prompts(folder / "heldout.jsonl", heldout)
        return {**counts, "bad_rows": bad[:NUM_TOLD_ROWS] if bad else []}

    def _read(self, stage: str, source: DataFile, setting: str, bad: list[str] | None) -> list[Row]:
        """Rows as ``read_rows``. RunError if they are others than those that the stage's fingerprint stands for."""
        rows = read_rows(source, setting, bad=bad)
        if self.config.world is None and file_fingerprint(source.path) != self.folder(stage).inputs["read"]:
            raise RunError(f"{source.path} changed while it was read: run again")
        return rows

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.paths.policy_base, trust_remote_code=self.config.trust_remote_code)

    async def _pairs(self, folder: Path) -> dict[str, object]:
        config, tokenizer = self.config, self._tokenizer()
        counts: Mapping[str, object]
        if config.pairs.ready:
            bad = bad_rows(config.pairs.ready)
            rows = self._read("pairs", config.pairs.ready, "pairs.ready", bad)
            pairs, counts = load_pairs(config.data, rows, tokenizer, config.rollout.max_new_tokens, bad)
            counts = {**counts, "bad_rows": bad[:NUM_TOLD_ROWS] if bad else []}
        else:
            pairs, counts = await sample_pairs(config, self.cluster, self.training_prompts(), tokenizer, self.show)
        training, heldout = split_pairs(pairs, config.pairs.heldout_share, config.seed)
        write_pairs(folder / "train.jsonl", training)
        write_pairs(folder / "heldout.jsonl", heldout)
        return {"num_training": len(training), "num_heldout": len(heldout), **counts}

    async def _logprobs(self, folder: Path) -> dict[str, object]:
        from safetensors.numpy import save_file

        logprobs = await self.cluster.behaviour_logprobs(self.num_training_pairs(), self.show)
        save_file({"logprobs": logprobs}, folder / "behaviour.safetensors")
        return {"mean": float(logprobs.mean())}

    def training_prompts(self) -> list[Prompt]:
        return read_prompts(self.paths.root / "data" / "prompts.jsonl")

    def heldout_prompts(self) -> list[Prompt]:
        return read_prompts(self.paths.root / "data" / "heldout.jsonl")

    def num_training_pairs(self) -> int:
        """As the pair stage counted them."""
        return int(self.folder("pairs").facts["num_training"])

    def behaviour_logprobs(self) -> FloatArray | None:
        """What the last stage left; None where no ratio is needed."""
        from safetensors.numpy import load_file

        if not self._needs_logprobs:
            return None
        return load_file(self.paths.root / "logprobs" / "behaviour.safetensors")["logprobs"]

    def first_accuracy(self) -> float | None:
        """Of the first reward model on held-out pairs; None for a ready one."""
        accuracy: float | None = None
        if self.config.reward.ready is None:
            accuracy = self.folder(Path(self.paths.reward).name).facts.get("heldout_accuracy")
        return accuracy
