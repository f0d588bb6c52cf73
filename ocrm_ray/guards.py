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
        """RunError: the policy is further from the SFT model than ``max_kl``."""
        told, bound = {"policy_version": update.version}, self.settings.max_kl
        if num := update.num_skipped_steps:
            self._tell("gradient", "skipped", num, self.settings.max_skipped_steps, **told)
        if bound is not None and update.kl_sft is not None and not update.kl_sft <= bound:
            self._tell("kl", "stopped", update.kl_sft, bound, **told)
            raise RunError(
                f"update {update.version}: KL to the SFT model {update.kl_sft:.4g} nats a response, guards.max_kl "
                f"{bound:g}: raise policy.kl_coefficient, lower the learning rate, or raise the bound"
            )

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
