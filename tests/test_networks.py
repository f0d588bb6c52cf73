"""Against a second implementation: a plain Hugging Face forward of each sequence alone, in float64."""

import pickle

import numpy as np
import pytest
import torch
import transformers
from tiny_models import EOS, build_policy, build_tokenizer, llama_config, pad_batch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from ocrm_ray.batches import SequenceTable
from ocrm_ray.config import Pool
from ocrm_ray.errors import RunError, UserError
from ocrm_ray.networks import (
    CausalModel,
    checkpoint_layers,
    last_token_scores,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    require_own_logits,
    response_logprobs,
    response_values,
    row_log_weights,
    save_model,
)
from ocrm_ray.records import Sequence

SEQUENCES = [
    Sequence((5, 6, 7), (8, 9, 10, EOS), True),
    Sequence((11,), (12, EOS), True),
    Sequence((13, 14, 15, 16, 17), (18, 19, 20, 21, 22, 23), False),
]


def oracle_logits(model, sequence):
    """Float64 logits [T, V] that predict the response, from the sequence alone."""
    tokens = torch.tensor([sequence.prompt_ids + sequence.response_ids])
    with torch.no_grad():
        logits = model.double()(input_ids=tokens).logits[0]
    model.float()
    return logits[len(sequence.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_batched_logprobs_equal_a_float64_forward_of_each_sequence_alone(temperature):
    model = build_policy()
    logprobs = response_logprobs(CausalModel(model), pad_batch(SEQUENCES, pad_id=EOS), temperature).detach()
    for row, sequence in zip(logprobs, SEQUENCES, strict=True):
        logits = oracle_logits(model, sequence) / temperature
        expected = logits.log_softmax(-1)[torch.arange(len(logits)), list(sequence.response_ids)]
        torch.testing.assert_close(row[: len(expected)].double(), expected, atol=2e-5, rtol=1e-5)
        assert (row[len(expected) :] == 0).all()


def test_entropy_is_that_of_the_distribution_sampled_from():
    model = build_policy()
    _, entropy = CausalModel(model)(pad_batch(SEQUENCES, pad_id=EOS), 0.7, with_entropy=True)
    for row, sequence in zip(entropy, SEQUENCES, strict=True):
        logprobs = (oracle_logits(model, sequence) / 0.7).log_softmax(-1)
        expected = -(logprobs.exp() * logprobs).sum(-1)
        torch.testing.assert_close(row[: len(expected)].double(), expected, atol=2e-5, rtol=1e-5)


def test_wpo_weights_of_rows_equal_a_float64_forward_of_each_sequence_alone_whatever_the_chunks():
    model, rows = build_policy(), np.array([2, 0, 2, 1])
    pool = Pool(batch_size=2)
    found = row_log_weights(CausalModel(model), SequenceTable(SEQUENCES, EOS, False), rows, 0.7, pool)
    expected = []
    for sequence in (SEQUENCES[row] for row in rows):
        logprobs = (oracle_logits(model, sequence) / 0.7).log_softmax(-1)
        said = logprobs[torch.arange(len(logprobs)), list(sequence.response_ids)]
        expected.append((said - logprobs.exp().square().sum(-1).log()).mean())
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_logprobs_do_not_depend_on_the_batch_or_the_padding_id():
    model = build_policy()
    with torch.no_grad():
        together = response_logprobs(CausalModel(model), pad_batch(SEQUENCES, pad_id=EOS), 1.0)
        for row, sequence in zip(together, SEQUENCES, strict=True):
            alone = response_logprobs(CausalModel(model), pad_batch([sequence], pad_id=7), 1.0)[0]
            torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=0)


GROUP = [Sequence((5, 6, 7), response, True) for response in ((8, 9, EOS), (10, EOS), (11, 12, 13, 14, EOS))]


def logprobs_and_gradients(share_prompts):
    model = build_policy()
    logprobs = response_logprobs(CausalModel(model), pad_batch([*GROUP, *SEQUENCES], EOS, share_prompts), 1.0)
    logprobs.square().mean().backward()
    return logprobs.detach(), [parameter.grad for parameter in model.parameters()]


def test_responses_that_share_a_prompt_get_the_logprobs_and_gradients_that_they_have_alone():
    shared, alone = logprobs_and_gradients(share_prompts=True), logprobs_and_gradients(share_prompts=False)
    torch.testing.assert_close(shared, alone, atol=2e-5, rtol=2e-3)


def test_rewards_and_values_do_not_depend_on_whether_prompts_are_shared(reward_folder):
    model = load_reward_model(reward_folder, dtype="float32", trust_remote_code=False)
    batches = [pad_batch(GROUP, EOS, share_prompts) for share_prompts in (True, False)]
    for read in (last_token_scores, response_values):
        torch.testing.assert_close(*(read(model, batch) for batch in batches), atol=2e-5, rtol=1e-4)


def test_network_with_windowed_layers_is_refused_shared_prompts():
    config = transformers.Gemma2Config(**SMALL, head_dim=16)
    model = CausalModel(transformers.Gemma2ForCausalLM(config).eval())
    response_logprobs(model, pad_batch(GROUP, EOS), 1.0)
    with pytest.raises(RunError, match=r"Gemma2ForCausalLM.* share_prompts to false"):
        response_logprobs(model, pad_batch(GROUP, EOS, share_prompts=True), 1.0)


def test_network_that_ignores_the_mask_is_refused_shared_prompts():
    model = build_policy()
    forward = model.base_model.forward
    model.base_model.forward = lambda attention_mask=None, **inputs: forward(**inputs)
    with pytest.raises(RunError, match="share_prompts to false"):
        response_logprobs(CausalModel(model), pad_batch(GROUP, EOS, share_prompts=True), 1.0)


def test_gradient_reaches_the_policy_through_real_tokens_only():
    gradients = []
    for pad_id in (EOS, 30):
        model = build_policy()
        response_logprobs(CausalModel(model), pad_batch(SEQUENCES, pad_id), 1.0).sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[1][30] == 0).all()


def test_padding_reaches_neither_the_head_nor_more_of_it_than_the_responses():
    model, rows = build_policy(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape))
    response_logprobs(CausalModel(model), pad_batch(SEQUENCES, pad_id=EOS), 1.0)
    assert rows == [(4 + 2 + 6, 32)]


SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "initializer_range": 0.3}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": 1}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.8, "head_dim": 16}),
        ("Granite", {"logits_scaling": 5.0}),
        ("Cohere", {"logit_scale": 0.3}),
    ],
)
def test_architectures_that_scale_or_cap_their_logits_get_their_own_logprobs(tmp_path, architecture, settings):
    torch.manual_seed(5)
    config = getattr(transformers, f"{architecture}Config")(**SMALL, **settings)
    network = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    save_model(network, build_tokenizer(), tmp_path / "lm")
    model = load_causal_lm(tmp_path / "lm", dtype="float32", trust_remote_code=False)
    with torch.no_grad():
        found = response_logprobs(model, pad_batch(SEQUENCES[2:], pad_id=EOS), 0.7)[0]
    expected = (oracle_logits(network, SEQUENCES[2]) / 0.7).log_softmax(-1)
    tokens = torch.tensor(SEQUENCES[2].response_ids)
    torch.testing.assert_close(found.double(), expected[torch.arange(6), tokens], atol=1e-4, rtol=1e-4)


def test_architecture_whose_logits_are_more_than_its_heads_is_refused_by_name():
    class Doubling(transformers.LlamaForCausalLM):
        def forward(self, **inputs):
            outputs = super().forward(**inputs)
            outputs.logits = 2 * outputs.logits
            return outputs

    require_own_logits(CausalModel(build_policy()))
    with pytest.raises(RunError, match="Doubling: its logits are not those of its head"):
        require_own_logits(CausalModel(Doubling(llama_config()).eval()))


def gradients_and_saved_bytes(checkpointed):
    model, saved = CausalModel(build_policy(attention_dropout=0.5)), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if checkpointed:
        checkpoint_layers(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = response_logprobs(model, pad_batch(SEQUENCES, pad_id=EOS), 1.0).sum()
    loss.backward()
    activations = sum(size for place, size in saved.items() if place not in weights)
    return [parameter.grad for parameter in model.parameters()], activations


def test_checkpointed_layers_give_the_same_gradients_from_fewer_saved_activations():
    gradients, saved = gradients_and_saved_bytes(checkpointed=True)
    expected, saved_without = gradients_and_saved_bytes(checkpointed=False)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert saved < saved_without / 3


def test_network_without_layers_to_checkpoint_is_refused():
    with pytest.raises(RunError, match=r"Linear has no layers to checkpoint: set policy\.gradient_checkpointing"):
        checkpoint_layers(torch.nn.Linear(2, 2))


@pytest.fixture
def reward_folder(tmp_path):
    torch.manual_seed(4)
    network = LlamaForSequenceClassification(llama_config(num_labels=1, pad_token_id=EOS)).eval()
    save_model(network, build_tokenizer(), tmp_path / "rm")
    return tmp_path / "rm"


def oracle_scores(model, sequence):
    """Float64 scores [L] of every token of the sequence alone."""
    network = model.network.double()
    with torch.no_grad():
        hidden = network.model(input_ids=torch.tensor([sequence.prompt_ids + sequence.response_ids]))[0]
    scores = hidden[0] @ network.score.weight[0]
    network.float()
    return scores


def test_score_is_read_at_the_last_token_even_where_padding_is_eos(reward_folder):
    model = load_reward_model(reward_folder, dtype="float32", trust_remote_code=False)
    scores = last_token_scores(model, pad_batch(SEQUENCES, pad_id=EOS)).detach()
    expected = torch.stack([oracle_scores(model, sequence)[-1] for sequence in SEQUENCES])
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)


def test_value_of_a_token_is_that_of_the_state_before_it(reward_folder):
    model = load_reward_model(reward_folder, dtype="float32", trust_remote_code=False)
    values = response_values(model, pad_batch(SEQUENCES, pad_id=EOS)).detach()
    for row, sequence in zip(values, SEQUENCES, strict=True):
        expected = oracle_scores(model, sequence)[len(sequence.prompt_ids) - 1 : -1]
        torch.testing.assert_close(row[: len(expected)].double(), expected, atol=2e-5, rtol=1e-5)
        assert (row[len(expected) :] == 0).all()


def test_scores_of_a_bfloat16_backbone_are_not_rounded_to_bfloat16(reward_folder):
    model = load_reward_model(reward_folder, dtype="bfloat16", trust_remote_code=False)
    scores = last_token_scores(model, pad_batch(SEQUENCES, pad_id=EOS)).detach()
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_saved_reward_model_scores_alike_in_hugging_face(reward_folder, tmp_path):
    model = load_reward_model(reward_folder, dtype="float32", trust_remote_code=False)
    save_model(model, build_tokenizer(), tmp_path / "again")
    plain = LlamaForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    tokens = torch.tensor([SEQUENCES[2].prompt_ids + SEQUENCES[2].response_ids])
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits[0, 0]
        score = last_token_scores(model, pad_batch([SEQUENCES[2]], pad_id=EOS))[0]
    torch.testing.assert_close(score, expected)


def test_new_head_on_a_causal_lm_depends_on_the_seed_alone(tmp_path):
    lm = build_policy()
    save_model(lm, build_tokenizer(), tmp_path / "lm")
    first, again, other = (
        load_reward_model(tmp_path / "lm", dtype="float32", trust_remote_code=False, head_seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.network.score.weight, again.network.score.weight)
    assert not torch.equal(first.network.score.weight, other.network.score.weight)
    assert torch.equal(first.network.model.layers[1].mlp.up_proj.weight, lm.model.layers[1].mlp.up_proj.weight)


def test_causal_lm_without_a_seed_is_no_reward_model(tmp_path):
    save_model(build_policy(), build_tokenizer(), tmp_path / "lm")
    with pytest.raises(ValueError, match="no seed for a new head"):
        load_reward_model(tmp_path / "lm", dtype="float32", trust_remote_code=False)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_policy_gives_the_same_logprobs_whether_tied_or_not(tmp_path, tied):
    model = build_policy(tie_word_embeddings=tied)
    save_model(model, build_tokenizer(), tmp_path / "policy")
    batch = pad_batch(SEQUENCES, pad_id=EOS)
    with torch.no_grad():
        expected = response_logprobs(CausalModel(model), batch, 1.0)
        loaded = load_causal_lm(tmp_path / "policy", dtype="float32", trust_remote_code=False)
        torch.testing.assert_close(response_logprobs(loaded, batch, 1.0), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    save_model(build_policy(), build_tokenizer(), tmp_path / "policy")
    (tmp_path / "policy" / "left-over").write_text("")
    save_model(build_policy(), build_tokenizer(), tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert not (tmp_path / "policy" / "left-over").exists()


def test_tokenizer_without_padding_pads_with_eos(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, trust_remote_code=False).pad_token_id == EOS


def test_a_tokenizer_without_eos_is_refused_with_the_folder_that_lacks_it(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert str(caught.value) == (
        f"sft: got '{tmp_path}', whose tokenizer has no EOS token, need one that has: "
        "set eos_token in its tokenizer_config.json"
    )


@pytest.mark.parametrize("text", ["", "{", '{"model": 3}', "\0"])
def test_a_tokenizer_that_cannot_be_loaded_is_a_mistake_of_one_line(tmp_path, text: str):
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="need a model with a tokenizer: correct the folder or Hub name") as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("load", [load_causal_lm, load_reward_model])
def test_pickled_weights_are_never_opened(tmp_path, load):
    """The check reads local folders only: a Hub's model comes here first."""
    opened = tmp_path / "opened"
    folder = tmp_path / "lm"
    model = LlamaForSequenceClassification(llama_config(num_labels=1)) if load is load_reward_model else build_policy()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(str(opened))))
    with pytest.raises(OSError, match="safetensors"):
        load(folder, dtype="float32", trust_remote_code=False)
    assert not opened.exists()


class Trap:
    """Its unpickling makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
