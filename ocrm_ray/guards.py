"""What a run does about numbers that should not be: each finding is an event ``guard``, some end what they concern."""

from collections.abc import Callable
from dataclasses import dataclass

from ocrm_ray.config import Guards
from ocrm_ray.errors import RunError
from ocrm_ray.records import RefitReport, UpdateReport


class RejectedError(RunError):
    """A refitted reward model that must not go live; a second attempt would give it again."""


@dataclass(frozen=True, slots=True)
class RunGuards:
    """``emit(event, **fields)``: which guard found which value beyond which bound, and what was done."""

    settings: Guards
    emit: Callable[..., None]

    def check_update(self, update: UpdateReport) -> None:
        """RunError: the policy is further from the SFT model, or from who sampled for it, than it may be."""
        if num := update.num_skipped_steps:
            where = {"policy_version": update.version}
            self._tell("gradient", "skipped", num, self.settings.max_skipped_steps, **where)
        do = "raise policy.kl_coefficient, lower the learning rate, or raise the bound"
        self._require("max_kl", update.version, "KL to the SFT model", "nats a response", update.kl_sft, do)
        what, do = "trainer and sampler differ by", "see probe.floor, use float32 in both pools, or raise the bound"
        self._require("max_logprob_gap", update.version, what, "nats a token", update.logprob_gap, do)

    def _require(self, name: str, version: int, what: str, unit: str, value: float | None, do: str) -> None:
        bound: float | None = getattr(self.settings, name)
        if bound is not None and value is not None and not value <= bound:
            self._tell(name.removeprefix("max_"), "stopped", value, bound, policy_version=version)
            raise RunError(f"update {version}: {what} {value:.4g} {unit}, guards.{name} {bound:g}: {do}")

    def check_weights(self, snapshot_version: int, ess_fraction: float) -> None:
        """Weights that hang on few pairs are told of, and used."""
        if not ess_fraction >= (bound := self.settings.min_ess_fraction):
            self._tell("ess", "reported", ess_fraction, bound, snapshot_version=snapshot_version)

    def check_refit(self, snapshot_version: int, refit: RefitReport, first_accuracy: float | None) -> None:
        """RejectedError: it is less accurate on held-out pairs than the first reward model, by more than allowed."""
        if first_accuracy is None:
            return
        bound = first_accuracy - self.settings.max_accuracy_drop
        if not refit.heldout_accuracy >= bound:
            self._tell("accuracy", "rejected", refit.heldout_accuracy, bound, snapshot_version=snapshot_version)
            raise RejectedError(
                f"the refit's accuracy on held-out pairs is {refit.heldout_accuracy:.3f}, the first reward model's "
                f"{first_accuracy:.3f}, guards.max_accuracy_drop {self.settings.max_accuracy_drop:g}"
            )

    def _tell(self, guard: str, action: str, value: float, bound: float, **where: int) -> None:
        self.emit("guard", guard=guard, action=action, value=value, bound=bound, **where)
