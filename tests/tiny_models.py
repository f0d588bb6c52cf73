"""Tiny Llama models over a vocabulary of 32 words, and runs that use them, for tests of networks and trainers."""

import numpy as np
import torch

from ocrm_ray.config import RunConfig
from ocrm_ray.preferences import Pair, write_pairs
from ocrm_ray.records import Prompt, Rollout, Sample, Scores, Sequence

EOS = 2
VOCABULARY_SIZE = 32
GOOD, BAD = 5, 6


def llama_config(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "initializer_range": 0.3,
        }
        | changes
    )


def build_policy(**changes):
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def build_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": EOS} | {f"w{i}": i for i in range(3, VOCABULARY_SIZE)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def save_policy(folder, **changes):
    """A saved policy; its folder as a string."""
    from ocrm_ray.networks import save_model

    save_model(build_policy(**changes), build_tokenizer(), folder)
    return str(folder)


def save_reward_model(folder, seed=4):
    """A saved reward model of one layer; its folder as a string."""
    from transformers import LlamaForSequenceClassification

    from ocrm_ray.networks import save_model

    torch.manual_seed(seed)
    config = llama_config(num_labels=1, num_hidden_layers=1, initializer_range=0.1, pad_token_id=EOS)
    save_model(LlamaForSequenceClassification(config).eval(), build_tokenizer(), folder)
    return str(folder)


def random_pairs(num_pairs, seed, prefers=lambda first, second: first.count(GOOD) > second.count(GOOD)):
    """Pairs of random responses with EOS, the one with more GOOD preferred; ties are drawn again."""
    random = np.random.default_rng(seed)
    pairs = []
    while len(pairs) < num_pairs:
        prompt = tuple(random.integers(3, VOCABULARY_SIZE, random.integers(1, 5)).tolist())
        first, second = (tuple(random.integers(5, 9, random.integers(3, 9)).tolist()) for _ in range(2))
        if prefers(first, second) == prefers(second, first):
            continue
        chosen, rejected = (first, second) if prefers(first, second) else (second, first)
        pairs.append(Pair("", *(Sequence(prompt, (*response, EOS), True) for response in (chosen, rejected))))
    return pairs


def run_config(tmp_path, **sections):
    """A run in ``tmp_path``; sections are dictionaries of changed keys."""
    return RunConfig.model_validate({"name": "test", "output_dir": tmp_path, "trust_remote_code": False} | sections)


def save_pairs(config, train, heldout=None):
    folder = config.stage_root / "pairs"
    folder.mkdir(parents=True)
    write_pairs(folder / "train.jsonl", train)
    write_pairs(folder / "heldout.jsonl", heldout or train[:8])


def scored_rollout(sequences, logprobs, rewards, *, versions=(0, 0), sampled_at=(0, 0), anchor=None):
    """One prompt's rollout; ``versions``: of reward model and anchor; the SFT log-probs are the anchor's."""
    anchor = logprobs if anchor is None else anchor
    samples = tuple(Sample(s, row, *sampled_at) for s, row in zip(sequences, logprobs, strict=True))
    scores = tuple(
        Scores(reward, versions[0], row, versions[1], row) for reward, row in zip(rewards, anchor, strict=True)
    )
    return Rollout(Prompt(0, "", sequences[0].prompt_ids), samples, 0, scores)


def pad_batch(sequences, pad_id: int, share_prompts: bool = False):
    """All ``sequences`` as one batch on the CPU."""
    from ocrm_ray.batches import SequenceTable

    return SequenceTable(sequences, pad_id, share_prompts).batch(range(len(sequences)))
