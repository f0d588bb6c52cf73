"""A word tokenizer and a tiny random sentence encoder, saved as Hugging Face folders."""

from pathlib import Path
from typing import Any

import torch

WORDS = ["the", "old", "river", "was", "quiet", "and", "new", "lamp", "great", "warm"]


def save_tokenizer(folder: Path, *, sentence_marks: bool, template: str | None = None, pad: bool = True) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        word: i for i, word in enumerate(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Q:", "A:", *WORDS]))
    }
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    if sentence_marks:
        marks = [("[CLS]", 2), ("[SEP]", 3)]
        words.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", marks)
    specials = {"pad_token": "[PAD]"} if pad else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]", **specials)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_encoder(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            initializer_range=0.5,
        )
    )
    model.save_pretrained(folder)
    return model.eval()
