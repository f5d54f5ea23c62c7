"""The tokenizer of the demonstration's language model: small, made from nothing, no training.

It behaves like the Llama tokenizers: a begin token in front, a word-start mark in front of words,
one token per digit, bytes for everything it does not know, and the published ids of ``<unk>``,
``<s>``, ``</s>`` and of the newline byte (13). Its words are those of the conversation templates
and of the embedded data, so prompts stay short.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORD_START = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")

WORDS = """
A chat between a curious user and an artificial intelligence assistant The assistant gives helpful
detailed polite answers to user questions USER ASSISTANT
What does the sign say colour shape is mark Read picture
red green blue orange purple circle square triangle
How many Which Where Who Describe this image the of in on it Is there yes no Yes No with one two
three
"""


def vocabulary() -> list[str]:
    """All tokens by id: specials, bytes, printable ASCII characters, words."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), WORD_START]
    tokens += [chr(code) for code in range(0x21, 0x7F)]
    words = [WORD_START + word for word in WORDS.split()]
    # Words also occur without a space before them, after a newline for instance.
    words += [word for word in WORDS.split() if len(word) > 1]
    tokens += list(dict.fromkeys(words))
    return tokens


def build_demo_tokenizer() -> PreTrainedTokenizerBase:
    """Builds the tokenizer; always the same.

    Returns:
        A fast tokenizer of a few hundred tokens that can encode any text.
    """
    tokens = vocabulary()
    model = BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token=SPECIAL[0],
        fuse_unk=True,
        byte_fallback=True,
        # A piece that is in the vocabulary is taken whole, so no merges are needed.
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(WORD_START), normalizers.Replace(" ", WORD_START)]
    )
    # Words with the mark before them; every digit, sign and line break alone.
    pieces = Regex(f"{WORD_START}?[A-Za-z]+|[^A-Za-z]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(WORD_START, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
