"""A weight receiver with a fault that a test can switch on; imported by vLLM's worker process."""

from actors.vllm_worker import WeightReceiver


class FaultyReceiver(WeightReceiver):
    """``drop_head(True)`` leaves the tied head out of later reloads, as a plain export of a tied model would."""

    head_is_dropped = False

    def drop_head(self, dropped: bool) -> None:
        self.head_is_dropped = dropped

    def hide_shadow(self, hidden: bool) -> None:
        """Weights are then taken as where there is no second model: by vLLM's own reload, in the pause."""
        if hidden:
            self.hidden, self._shadow = self._shadow, None
        else:
            self._shadow = self.hidden

    def _load(self, tensors):
        kept = [name for name in tensors if not self.head_is_dropped or name != "lm_head.weight"]
        super()._load({name: tensors[name] for name in kept})
