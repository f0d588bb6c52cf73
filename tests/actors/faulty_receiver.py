"""A weight receiver with a fault that a test can switch on; imported by vLLM's worker process."""

from actors.vllm_worker import WeightReceiver


class FaultyReceiver(WeightReceiver):
    """``drop_head(True)`` leaves the tied head out of later reloads, as a plain export of a tied model would."""

    head_is_dropped = False

    def drop_head(self, dropped: bool) -> None:
        self.head_is_dropped = dropped

    def receive_weights(self, path: str) -> None:
        if not self.head_is_dropped:
            super().receive_weights(path)
            return
        from safetensors.torch import load_file

        kept = [(name, tensor) for name, tensor in load_file(path).items() if name != "lm_head.weight"]
        self.model_runner.reload_weights(weights_iterator=iter(kept))
