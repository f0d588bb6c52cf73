"""The networks: causal language models and reward models, how they are loaded and saved, and what they say of a batch.

Every function that takes a network also takes a DeepSpeed engine around one.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ocrm_ray import ranks
from ocrm_ray.algorithm.logprobs import MAX_LOGITS, head_logprobs, log_collision, sequence_logprobs, token_entropy
from ocrm_ray.algorithm.wpo import response_log_weights
from ocrm_ray.attention import use_products
from ocrm_ray.batches import PaddedBatch, SequenceTable, cut_rows
from ocrm_ray.config import Dtype, Pool
from ocrm_ray.errors import RunError, mistake
from ocrm_ray.records import FloatArray, IntArray, Sequence

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLASSIFIER_SUFFIX = "ForSequenceClassification"


class ScalarHead(nn.Linear):
    """A head with one output, computed in float32 whatever the backbone's precision."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class CausalModel(nn.Module):
    """A causal language model that is asked only how likely responses are: [B, L, V] logits never exist.

    ``forward``: a batch -> (log-probs of the response tokens, entropy or log collision probability of the distribution
    behind each), float32 [B, T], 0 behind the end of each response; the latter without gradient, None unless asked for.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, batch: PaddedBatch, temperature: float, with_entropy: bool = False, *, with_collisions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        assert not (with_entropy and with_collisions)
        statistic = token_entropy if with_entropy else log_collision if with_collisions else None
        places, tokens = batch.response_tokens()
        hidden = _hidden_states(self.network, batch).flatten(0, 1).index_select(0, places)
        num_rows = max(1, MAX_LOGITS // self.network.config.get_text_config().vocab_size)
        if is_in_step(self.network):
            num_chunks = ranks.largest(-(-len(tokens) // num_rows))
            num_rows = -(-len(tokens) // num_chunks)
            num_more = num_chunks * num_rows - len(tokens)
            hidden, tokens = nn.functional.pad(hidden, (0, 0, 0, num_more)), nn.functional.pad(tokens, (0, num_more))
        logprobs, statistics = head_logprobs(self.logits, hidden, tokens, temperature, num_rows, statistic=statistic)
        mask = batch.response_mask
        zeros = torch.zeros(mask.shape, device=mask.device)
        logprobs = zeros.masked_scatter(mask, logprobs)
        return logprobs, None if statistics is None else zeros.masked_scatter(mask, statistics)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's logits, scaled and capped as the architecture's configuration says."""
        logits: Tensor = self.network.get_output_embeddings()(hidden)
        settings = self.network.config.get_text_config()
        scale = (getattr(settings, "logit_scale", None) or 1.0) / getattr(settings, "logits_scaling", 1.0)
        if scale != 1:
            logits = logits * scale
        cap = getattr(settings, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


class ScalarModel(nn.Module):
    """A causal sequence-classification network with one label, read at every token: reward model or critic.

    Hugging Face reads the score in front of the first padding token, which is the wrong place where padding and
    EOS share an id; here the caller says which token counts. ``forward``: R rows of L tokens -> float32 [R * L], or
    with ``states`` the hidden states that are scored, [R * L, H].
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        head = network.score
        network.score = ScalarHead(head.in_features, 1, bias=head.bias is not None, dtype=head.weight.dtype)
        network.score.load_state_dict(head.state_dict())
        self.network = network

    def forward(self, batch: PaddedBatch, states: bool = False) -> Tensor:
        hidden = _hidden_states(self.network, batch)
        if states:
            return hidden.flatten(0, 1)
        scores: Tensor = self.network.score(hidden)
        return scores.flatten()


def is_in_step(network: Any) -> bool:
    """Whether every rank must call the network's modules equally often, since each has but a part of the weights.

    So it is with ZeRO 3 on several ranks, whose trainer then sets ``network.in_step``.
    """
    return getattr(network, "in_step", False)


def idle_loss(module: "CausalModel | ScalarModel", forward: Callable[..., Any]) -> Tensor:
    """0, by a forward pass over two tokens: a rank that has no share left takes part in the others' pass so."""
    device = next(module.parameters()).device
    batch = SequenceTable([Sequence((1,), (1,), False)], 0, share_prompts=False).batch([0]).to(device)
    output: Tensor = forward(batch, 1.0)[0] if isinstance(module, CausalModel) else forward(batch)
    return 0.0 * output.sum()


def _hidden_states(network: Any, batch: PaddedBatch) -> Tensor:
    """[R, L, H], 0 where a block has ended. RunError if rows are shared that the network would not keep apart."""
    in_step = is_in_step(network)
    if (batch.mask is not None or in_step) and not hasattr(network, "keeps_apart"):
        network.keeps_apart = True
        network.keeps_apart = _keeps_apart(network)
    if batch.mask is not None and not network.keeps_apart:
        raise RunError(f"{type(network).__name__}: its attention takes no mask of ours, set share_prompts to false")
    # Embedded together: the gradient of every lookup is as large as the table.
    embedded, states = network.get_input_embeddings()(batch.tokens), []
    for rows, width in [(slice(None), batch.tokens.shape[1])] if in_step else batch.blocks():
        inputs = {"inputs_embeds": embedded[rows, :width]}
        if batch.mask is not None:
            inputs["position_ids"] = batch.positions[rows, :width]
            inputs["attention_mask"] = batch.mask[rows, :, :width, :width]
        block = network.base_model(**inputs, use_cache=False).last_hidden_state
        states.append(nn.functional.pad(block, (0, 0, 0, embedded.shape[1] - width)))
    return torch.cat(states)


@torch.no_grad()
def _keeps_apart(network: Any) -> bool:
    """Whether a response in a row with another has the hidden states that it has alone; windows are not tried."""
    if set(getattr(network.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}:
        return False
    sequences = [Sequence((1, 2), (3, 4), True), Sequence((1, 2), (5, 6), True)]
    hidden = []
    for share_prompts in (True, False):
        batch = SequenceTable(sequences, 0, share_prompts).batch([0, 1]).to(next(network.parameters()).device)
        hidden.append(_hidden_states(network, batch).flatten(0, 1)[batch.last_places].float())
    shared, alone = hidden
    return bool((shared - alone).abs().max() <= 0.02 * alone.abs().max())


@torch.no_grad()
def require_own_logits(model: "CausalModel | ScalarModel") -> None:
    """RunError where a network computes its logits in a way that its head, hidden states and embeddings do not show."""
    network = model.network
    tokens = [token for token in range(1, 6) if token != network.config.pad_token_id][:4]
    batch = SequenceTable([Sequence((tokens[0],), tuple(tokens[1:]), False)], 0, share_prompts=False).batch([0])
    expected = network(input_ids=batch.tokens, use_cache=False).logits.float()[0]
    if isinstance(model, CausalModel):
        found = model.logits(_hidden_states(network, batch)[0]).float()
    else:
        found = model(batch)[-1:]
    expected = expected[-len(found) :].reshape(found.shape)
    if (found - expected).abs().max() > 0.02 * expected.abs().max():
        raise RunError(f"{type(network).__name__}: its logits are not those of its head on its hidden states")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder; one without a padding token pads with EOS.

    UserError: it cannot be loaded, or has no EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # each kind of tokenizer has its own
        got = f"{str(path)!r} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        raise mistake("sft", got, "a model with a tokenizer", "correct the folder or Hub name") from error
    if tokenizer.eos_token_id is None:
        do = "set eos_token in its tokenizer_config.json"
        raise mistake("sft", f"{str(path)!r}, whose tokenizer has no EOS token", "one that has", do)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(path: str | Path, *, trust_remote_code: bool) -> int | None:
    """Most tokens of prompt and response that a model takes; None where its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def load_causal_lm(path: str | Path, *, dtype: Dtype, trust_remote_code: bool) -> CausalModel:
    """A causal language model on the CPU, in evaluation mode (no dropout, in training either).

    RunError: an architecture whose logits are more than its head's.
    """
    from transformers import AutoModelForCausalLM

    with _quiet_loading():
        network = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, use_safetensors=True
        )
    use_products(network)
    model = CausalModel(network).eval()
    require_own_logits(model)
    return model


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
            path, num_labels=1, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, use_safetensors=True
        )
    if not isinstance(getattr(network, "score", None), nn.Linear):
        raise ValueError(f"{path}: {type(network).__name__} has no linear head named score, so it is not causal")
    use_products(network)
    model = ScalarModel(network).eval()
    if head_seed is not None and not has_head:
        _draw_head(network.score, head_seed)
    require_own_logits(model)
    return model


def reward_members(path: str | Path) -> list[str]:
    """Folders of the reward models at ``path``: an ensemble's members in order, or itself."""
    members = sorted(Path(path).glob("member-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    return [str(member) for member in members] or [str(path)]


def checkpoint_layers(model: nn.Module) -> None:
    """Let each decoder layer keep its input alone, and compute the rest again in the backward pass.

    Done here because Hugging Face's own switch needs the layers in training mode, where some have dropout.
    RunError: an architecture without such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise RunError(
            f"{type(model).__name__} has no layers to checkpoint: set policy.gradient_checkpointing to false"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def save_model(model: Any, tokenizer: Any, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder, complete or not at all; what stood there is replaced.

    ``state_dict``: full weights to write where the network itself holds only a share of them.
    """
    folder = Path(folder)
    network = getattr(model, "network", model)
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
    """Float32 [B, T]: a ``CausalModel``'s log-probs of the response tokens, 0 behind the end of each response."""
    logprobs: Tensor = model(batch, temperature)[0]
    return logprobs


def last_token_scores(model: Any, batch: PaddedBatch) -> Tensor:
    """Float32 [B]: scores of a reward model at the last token of each sequence."""
    scores: Tensor = model(batch)
    return scores[batch.last_places]


def last_token_states(model: Any, batch: PaddedBatch) -> Tensor:
    """[B, H]: the hidden states that a reward model scores."""
    states: Tensor = model(batch, True)
    return states[batch.last_places]


def response_values(model: Any, batch: PaddedBatch) -> Tensor:
    """Float32 [B, T]: a critic's values of the states in which the response tokens were chosen, 0 past the end."""
    values: Tensor = model(batch)
    return values[batch.predicting].masked_fill(~batch.response_mask, 0.0)


def table_logprobs(
    model: Any, table: SequenceTable, temperature: float, pool: Pool, rows: IntArray | None = None
) -> list[FloatArray]:
    """Log-probs [T] of the response of each row, or of each of ``rows``; tables go in chunks that ``pool`` bounds."""
    return _each(model, table, rows, pool, lambda batch: response_logprobs(model, batch, temperature))


def table_values(model: Any, table: SequenceTable, pool: Pool) -> list[FloatArray]:
    """A critic's values [T] of the states behind each row's response tokens."""
    return _each(model, table, None, pool, lambda batch: response_values(model, batch))


def row_sums(model: Any, table: SequenceTable, rows: IntArray, temperature: float, pool: Pool) -> Tensor:
    """Summed response log-probs, float32 [N] on the CPU, of table rows ``rows`` [N]."""

    def sums(batch: PaddedBatch) -> Tensor:
        return sequence_logprobs(response_logprobs(model, batch, temperature), batch.response_mask)

    return torch.from_numpy(np.stack(_each(model, table, rows, pool, sums)))


def row_log_weights(model: Any, table: SequenceTable, rows: IntArray, temperature: float, pool: Pool) -> Tensor:
    """WPO's log-weight of the response of each of table rows ``rows`` [N], float32 [N] on the CPU."""

    def log_weights(batch: PaddedBatch) -> Tensor:
        logprobs, collisions = model(batch, temperature, with_collisions=True)
        return response_log_weights(logprobs, collisions, batch.response_mask)

    return torch.from_numpy(np.stack(_each(model, table, rows, pool, log_weights)))


def table_scores(model: Any, table: SequenceTable, pool: Pool) -> Tensor:
    """A reward model's raw scores at the last token, float32 [N] on the CPU."""
    return torch.from_numpy(np.stack(_each(model, table, None, pool, lambda batch: last_token_scores(model, batch))))


@torch.no_grad()
def _each(
    model: Any, table: SequenceTable, rows: IntArray | None, pool: Pool, compute: Callable[[PaddedBatch], Tensor]
) -> list[Any]:
    """What ``compute`` gives, [B] or [B, T], for each row, or each of ``rows``, in their order and on the CPU."""
    rows = np.arange(len(table)) if rows is None else rows
    device = next(model.parameters()).device
    results: dict[int, Any] = {}
    chunks = table.chunks(rows, pool.batch_size, pool.batch_tokens)
    chunks += [[0]] * (ranks.largest(len(chunks)) - len(chunks))  # ZeRO 3 needs every rank in every pass
    for chunk in chunks:
        batch = table.batch(rows[chunk]).to(device)
        values = compute(batch)
        cut = cut_rows(values, batch.response_mask) if values.ndim == 2 else values.float().cpu().numpy()
        results.update(zip(chunk, cut, strict=True))
    results = ranks.joined(results)
    return [results[position] for position in range(len(rows))]


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
