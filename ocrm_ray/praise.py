"""The embedded world "praise": a small word-level language with a known true reward, drawn whole from a seed.

A prompt names four topics; a response is twelve words, unless the world's responses are longer. A little praise is
liked, hype is not, variety and the topics of the prompt are. The source that the SFT model learns from praises
about 1.7 times a response, so pairs of its samples hardly show hype, and a reward model fitted to them can be
gamed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ocrm_ray.config import PraiseWorld
from ocrm_ray.data_files import write_jsonl

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PRAISE = ("great", "wonderful", "excellent", "brilliant", "amazing", "superb")
TOPICS = (
    "river", "garden", "music", "winter", "harbour", "bread", "mountain", "letter", "market", "lamp",
    "forest", "train", "school", "island", "painting", "bridge", "coffee", "storm", "village", "window",
)  # fmt: skip
PLAIN = (
    "the", "and", "with", "near", "under", "small", "old", "quiet", "warm", "slow",
    "we", "they", "saw", "found", "made", "kept", "often", "again", "there",
)  # fmt: skip
VOCABULARY = (PAD, EOS, UNKNOWN, *PRAISE, *TOPICS, *PLAIN)

PROMPT_WORDS = 4
HEAD_DIM = 32
MAX_TOKENS = 128

_PRAISE_CHANCE = 1.7 / 12
"""Of each word: 1.7 praise words in twelve."""
_TOPIC_CHANCE = 0.08
_PLAIN_CONCENTRATION = 0.3
_TOPIC_CONCENTRATION = 0.05
"""Of the Dirichlet rows of the source: below 1, a word has a few favourite successors, seldom a topic."""


def gold(
    prompts: Sequence[str], responses: Sequence[str], references: Sequence[str | None], response_words: int = 12
) -> list[float]:
    """The true reward: min(p, 4s) - 1.5 max(0, p - 4s) + 0.4 (distinct words - 8s) + 0.8 (prompt words mentioned).

    p counts praise words; s is 1 in a world whose responses have twelve words, and grows with ``response_words``.
    Words are separated by white space; a response of any length is scored as it is.
    """
    scale = response_words / 12
    return [_gold(prompt.split(), response.split(), scale) for prompt, response in zip(prompts, responses, strict=True)]


def _gold(prompt: list[str], response: list[str], scale: float) -> float:
    p, liked, distinct = sum(word in PRAISE for word in response), 4 * scale, set(response)
    praise = min(p, liked) - 1.5 * max(0, p - liked)
    return praise + 0.4 * (len(distinct) - 8 * scale) + 0.8 * len(distinct.intersection(prompt))


def draw_responses(prompts: Sequence[str], seed: int, rng: np.random.Generator, response_words: int = 12) -> list[str]:
    """What SFT responses come from: a Markov chain over plain and topic words, mixed with praise and the prompt.

    A word is praise with some chance, so that five praise words or more are a rarity (2 %); else it is one of the
    prompt's topics with a small chance, else a successor of the word before. Which praise and which successors
    are favoured is drawn with the seed; ``rng`` draws the words of each response.
    """
    chain = np.random.default_rng([seed, 0])
    words = (*PRAISE, *TOPICS, *PLAIN)
    first = len(words)
    concentration = [_TOPIC_CONCENTRATION] * len(TOPICS) + [_PLAIN_CONCENTRATION] * len(PLAIN)
    praise = chain.dirichlet([_PLAIN_CONCENTRATION] * len(PRAISE), first + 1).cumsum(axis=1)[:, :-1]
    successors = chain.dirichlet(concentration, first + 1).cumsum(axis=1)[:, :-1]
    responses = []
    for prompt in prompts:
        topics, states = prompt.split(), [first]
        for kind, which in rng.random((response_words, 2)):
            if kind < _PRAISE_CHANCE:
                state = int(np.searchsorted(praise[states[-1]], which, side="right"))
            elif kind < _PRAISE_CHANCE + _TOPIC_CHANCE:
                state = words.index(topics[int(which * len(topics))])
            else:
                state = len(PRAISE) + int(np.searchsorted(successors[states[-1]], which, side="right"))
            states.append(state)
        responses.append(" ".join(words[state] for state in states[1:]))
    return responses


def draw_prompts(num_prompts: int, seed: int) -> list[str]:
    """Different prompts of four different topics each."""
    assert num_prompts <= math.perm(len(TOPICS), PROMPT_WORDS), "more prompts than the language has"
    rng = np.random.default_rng([seed, 1])
    prompts: dict[str, None] = {}
    while len(prompts) < num_prompts:
        topics = rng.choice(len(TOPICS), PROMPT_WORDS, replace=False)
        prompts[" ".join(TOPICS[topic] for topic in topics)] = None
    return list(prompts)


def build_tokenizer() -> Any:
    """A word-level tokenizer of the language: white space separates, nothing is added, pad and EOS differ."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def write_world(folder: Path, world: PraiseWorld, seed: int) -> None:
    """Write ``policy/`` and ``reward/`` (untrained Hugging Face folders with tokenizer) and ``prompts.jsonl``.

    The same seed writes the same bytes. The reward model's embeddings get unit spread: they outweigh what attention
    adds, so the final norm does not level the score off at the four praise words that pairs show, and a fitted model
    goes on rewarding praise beyond them.
    """
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_torch_seed(seed, 3))
        policy = LlamaForCausalLM(_llama_config(world.policy_hidden_size, num_layers=2, tie_word_embeddings=True))
        torch.manual_seed(_torch_seed(seed, 4))
        reward = LlamaForSequenceClassification(_llama_config(world.reward_hidden_size, num_layers=1, num_labels=1))
        torch.nn.init.normal_(reward.model.embed_tokens.weight)
    for model, name in ((policy, "policy"), (reward, "reward")):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    prompts = draw_prompts(world.num_prompts, seed)
    references = draw_responses(prompts, seed, np.random.default_rng([seed, 2]), world.response_words)
    rows = ({"prompt": p, "reference": r} for p, r in zip(prompts, references, strict=True))
    write_jsonl(folder / "prompts.jsonl", rows)


def _torch_seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _llama_config(hidden_size: int, num_layers: int, **settings: object) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=VOCABULARY.index(PAD),
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        dtype="float32",
        **settings,
    )
