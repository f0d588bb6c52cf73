"""The networks: causal language models and reward models, how they are loaded and saved, and what they say of a batch.

Every function that takes a network also takes a DeepSpeed engine around one.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocrm_ray.algorithm.logprobs import token_entropy, token_logprobs
from ocrm_ray.batches import PaddedBatch
from ocrm_ray.config import Dtype

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLASSIFIER_SUFFIX = "ForSequenceClassification"


class ScalarHead(nn.Linear):
    """A head with one output, computed in float32 whatever the backbone's precision."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class ScalarModel(nn.Module):
    """A causal sequence-classification network with one label, read at every token: reward model or critic.

    Hugging Face reads the score in front of the first padding token, which is the wrong place where padding and
    EOS share an id; here the caller says which token counts. ``forward``: tokens [B, L] -> float32 [B, L].
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        head = network.score
        network.score = ScalarHead(head.in_features, 1, bias=head.bias is not None, dtype=head.weight.dtype)
        network.score.load_state_dict(head.state_dict())
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.network.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        scores: Tensor = self.network.score(hidden)
        return scores.squeeze(-1)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder; one without a padding token pads with EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(path: str | Path, *, trust_remote_code: bool) -> int | None:
    """Most tokens of prompt and response that a model takes; None where its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def load_causal_lm(path: str | Path, *, dtype: Dtype, trust_remote_code: bool) -> Any:
    """A causal language model on the CPU, in evaluation mode (no dropout, in training either)."""
    from transformers import AutoModelForCausalLM

    with _quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    return model.eval()


def load_reward_model(
    path: str | Path, *, dtype: Dtype, trust_remote_code: bool, head_seed: int | None = None
) -> ScalarModel:
    """A reward model on the CPU, in evaluation mode.

    A causal language model gets a new head, N(0, 1 / (hidden size + 1)) drawn with ``head_seed`` (ValueError
    without one); a sequence-classification folder keeps its own.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    has_head = any(name.endswith(CLASSIFIER_SUFFIX) for name in settings.architectures or ())
    if not has_head and head_seed is None:
        raise ValueError(f"{path}: not a sequence-classification model, and no seed for a new head")
    with _quiet_loading():
        network = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
        )
    if not isinstance(getattr(network, "score", None), nn.Linear):
        raise ValueError(f"{path}: {type(network).__name__} has no linear head named score, so it is not causal")
    model = ScalarModel(network).eval()
    if not has_head:
        assert head_seed is not None
        _draw_head(network.score, head_seed)
    return model


def save_model(model: Any, tokenizer: Any, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder, complete or not at all; what stood there is replaced.

    ``state_dict``: full weights to write where the network itself holds only a share of them.
    """
    folder = Path(folder)
    network = model.network if isinstance(model, ScalarModel) else model
    network.config.pad_token_id = tokenizer.pad_token_id
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _quiet_loading():
        network.save_pretrained(partial, state_dict=state_dict)
    tokenizer.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def response_logprobs(model: Any, batch: PaddedBatch, temperature: float) -> Tensor:
    """Float32 [B, T]: log-probs of the response tokens, 0 behind the end of each response."""
    logits, first = _response_logits(model, batch)
    return _of_responses(token_logprobs(logits, _next_tokens(batch, logits, first), temperature), batch, first)


def response_logprobs_and_entropy(model: Any, batch: PaddedBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """``response_logprobs``, and without gradient the entropy of the distribution behind each token, [B, T]."""
    logits, first = _response_logits(model, batch)
    logprobs = token_logprobs(logits, _next_tokens(batch, logits, first), temperature)
    with torch.no_grad():
        entropy = token_entropy(logits, temperature)
    return _of_responses(logprobs, batch, first), _of_responses(entropy, batch, first)


def last_token_scores(model: Any, batch: PaddedBatch) -> Tensor:
    """Float32 [B]: scores of a reward model at the last token of each sequence."""
    scores: Tensor = model(batch.tokens)
    return scores.gather(1, batch.last_positions[:, None]).squeeze(1)


def response_values(model: Any, batch: PaddedBatch) -> Tensor:
    """Float32 [B, T]: a critic's values of the states in which the response tokens were chosen, 0 past the end."""
    values: Tensor = model(batch.tokens)
    return values.gather(1, batch.predicting_positions()).masked_fill(~batch.response_mask, 0.0)


def _response_logits(model: Any, batch: PaddedBatch) -> tuple[Tensor, int]:
    """Logits [B, W, V] of the columns that predict any row's response, and the first of these columns."""
    first = int(batch.prompt_lengths.min()) - 1
    columns = torch.arange(first, batch.tokens.shape[1] - 1, device=batch.tokens.device)
    return model(input_ids=batch.tokens, use_cache=False, logits_to_keep=columns).logits, first


def _next_tokens(batch: PaddedBatch, logits: Tensor, first: int) -> Tensor:
    return batch.tokens[:, first + 1 : first + 1 + logits.shape[1]]


def _of_responses(values: Tensor, batch: PaddedBatch, first: int) -> Tensor:
    """Cut [B, T], aligned with the responses, out of [B, W]; 0 past the end of each response."""
    return values.gather(1, batch.predicting_positions() - first).masked_fill(~batch.response_mask, 0.0)


def _draw_head(head: nn.Linear, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(drawn)
        if head.bias is not None:
            head.bias.zero_()


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without progress bars, and without the warning that a new head is new."""
    from transformers.utils import logging

    verbosity: int = logging.get_verbosity()
    restore: Callable[[], None] = logging.enable_progress_bar if logging.is_progress_bar_enabled() else lambda: None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        restore()
