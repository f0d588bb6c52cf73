"""The errors of ocrm-ray: the user's mistakes (exit status 2) and failures of a run (exit status 1)."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake of the user's, printed as ``path: got X, need Y: do Z``, unprintable characters escaped."""

    path: str
    got: str
    need: str
    do: str

    def __str__(self) -> str:
        text = f"{self.path}: got {self.got}, need {self.need}: {self.do}"
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class OcrmError(Exception):
    """Base of every error that ocrm-ray raises on purpose."""


class UserError(OcrmError):
    """The user's mistakes, all that were found, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a UserError names at least one problem"
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def mistake(path: str, got: str, need: str, do: str) -> UserError:
    """A single mistake as an error."""
    return UserError([Problem(path, got, need, do)])


class RunError(OcrmError):
    """The run cannot go on; the message says why."""


class StaleWeightsError(RunError):
    """The engine's log-probs differ from the trainer's by more than the bound, twice in a row."""


class DeadlineError(RunError):
    """A wait took longer than its deadline allows."""


class StalledError(RunError):
    """A run makes no progress."""


class ActorDiedError(RunError):
    """An actor of a pool died."""
