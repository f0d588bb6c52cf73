"""Checkpoints: all that a run needs to go on at a step, complete and verified, or not there at all.

``checkpoints/step-N`` is the policy as a Hugging Face folder; ``state/`` in it has the rest: what the trainer's and
the scorers' processes wrote, the coordinator's ``run.json``, and ``manifest.json`` with the size and CRC-32 of every
file, those of the live reward model included. A folder gets its name only when all that is on the disk.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ocrm_ray.algorithm.schedule import CorrectionClock
from ocrm_ray.checked_files import Entry, entry_of
from ocrm_ray.config import Section
from ocrm_ray.errors import mistake
from ocrm_ray.records import OnPolicyState

STATE, RUN, MANIFEST = "state", "run.json", "manifest.json"
POLICY, ANCHOR = "policy", "anchor"
FOLDER, PREFIX = "checkpoints", "step-"


class RunState(Section):
    """What the coordinator knows between update ``step`` and the next."""

    step: int
    reward_version: int
    anchor_version: int
    clock: CorrectionClock
    """With the snapshot of the correction in flight, if there is one: it starts again from its snapshot."""
    num_issued: int
    """Rollouts asked for until now; they are numbered."""
    outstanding: tuple[int, ...]
    """Of these the ones that are not trained on: they are asked for again, with their prompts and seeds."""
    probe_bound: tuple[float, float]
    """Of the gap between engine and trainer: over all tokens, and over those read through the prefix cache."""
    on_policy: OnPolicyState
    """What the next refits take from rollouts."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole one; ``refused``: newer ones that are not, each with the reason."""

    folder: Path
    state: RunState
    refused: tuple[str, ...] = ()

    @property
    def trainer(self) -> Path:
        """What the processes wrote beside the policy."""
        return self.folder / STATE

    @property
    def anchor_path(self) -> str | None:
        """The live anchor's model folder; None for the SFT model."""
        return str(self.trainer / ANCHOR) if self.state.anchor_version else None


def reward_folder(run_dir: Path, reward_version: int, first: str) -> str:
    """Of the reward model of that version; version 0 is the ``first`` one."""
    return str(run_dir / "reward" / f"v{reward_version}") if reward_version else first


def begin(run_dir: Path, step: int) -> Path:
    """A folder for the parts of the checkpoint of ``step``: the model folder ``policy``, and ``state``."""
    partial = run_dir / FOLDER / f".{PREFIX}{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / STATE).mkdir(parents=True)
    return partial


def finish(
    partial: Path, state: RunState, written: Mapping[str, Entry], num_kept: int, origin: int | None = None
) -> Path:
    """Write the coordinator's part, bring everything to the disk, give the folder its name.

    ``written``: entries, by path in ``partial``, of files that are on the disk already; they are not read again. The
    newest ``num_kept`` checkpoints stay, and that of step ``origin``. Those of later steps are of a future that was
    given up: the run went back to before them.
    """
    run_dir, folder, whole = partial.parents[1], partial.with_name(f"{PREFIX}{state.step}"), partial / POLICY
    (partial / STATE).rename(whole / STATE)
    (whole / STATE / RUN).write_text(state.model_dump_json(), encoding="utf-8")
    others = {name: path for path in _files(whole) if (name := str(path.relative_to(whole))) not in written}
    files = {**written, **{name: entry_of(path, to_disk=True) for name, path in others.items()}}
    if state.reward_version:
        reward = Path(reward_folder(run_dir, state.reward_version, ""))
        files |= {os.path.relpath(path, folder): entry_of(path, to_disk=True) for path in _files(reward)}
    (whole / STATE / MANIFEST).write_text(json.dumps(files, indent=2), encoding="utf-8")
    for path in (whole / STATE / MANIFEST, *(path for path in whole.rglob("*") if path.is_dir()), whole):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    whole.rename(folder)
    partial.rmdir()
    _sync(folder.parent)
    steps = _folders(run_dir)
    staying = {*[step for step in steps if step <= state.step][:num_kept], origin}
    for step in steps.keys() - staying:
        shutil.rmtree(steps[step])
    return folder


def is_any(run_dir: Path) -> bool:
    """Whether there is a checkpoint, whole or not."""
    return bool(_folders(run_dir))


def forget_unsaved(run_dir: Path) -> None:
    """Without a checkpoint, remove what an unfinished RL wrote: it starts over, and its lines must not mix."""
    if is_any(run_dir):
        return
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl", "summary.json", "sft_gold.json"):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("tensorboard", "checkpoints", "policy", "policy-best", "reward", "plots"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none at all. UserError where all are broken."""
    refused: list[str] = []
    for folder in _folders(run_dir).values():
        if reason := _fault(folder):
            refused.append(f"{folder.relative_to(run_dir)}: {reason}")
            continue
        state = RunState.model_validate_json((folder / STATE / RUN).read_bytes())
        return Checkpoint(folder, state, tuple(refused))
    if refused:
        need, do = "one that is whole", f"remove {run_dir / FOLDER} to begin RL again"
        raise mistake(str(run_dir / FOLDER), "; ".join(refused), need, do)
    return None


def _folders(run_dir: Path) -> dict[int, Path]:
    """By step, the newest first."""
    found = (run_dir / FOLDER).glob(f"{PREFIX}*")
    numbered = {int(number): path for path in found if (number := path.name.removeprefix(PREFIX)).isdigit()}
    return {step: numbered[step] for step in sorted(numbered, reverse=True)}


def _fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used."""
    try:
        files = json.loads((folder / STATE / MANIFEST).read_bytes())
        for name, entry in files.items():
            if entry_of(folder / name) != entry:
                return f"{name} is not what was written"
        RunState.model_validate_json((folder / STATE / RUN).read_bytes())
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
