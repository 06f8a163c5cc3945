"""Small tokenizers of the pocket FLUX: real CLIPTokenizer and T5Tokenizer classes, one token per caption word.

The vocabularies are learnt from the captions of the pocket world alone. Every byte (CLIP) or printable ASCII character
(T5) is also a token, so words that no caption holds are spelt out character by character instead of being lost.
"""

import json
import string
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

#: Tokens of both text encoders, start and end tokens included. The longest caption needs to fit.
TEXT_LENGTH = 24

_END_OF_WORD = "</w>"
_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
#: T5 writes a leading space as this character.
_SPACE = "\u2581"
#: Unigram scores (log probabilities): any word of the vocabulary beats any way of spelling it out.
_WORD_SCORE, _CHARACTER_SCORE = -2.0, -20.0


def caption_words(captions: Iterable[str]) -> list[str]:
    """The sorted words of the captions, split at white space, with a trailing comma taken off as a word of its own."""
    text = " ".join(captions).lower().replace(",", " , ")
    return sorted(set(text.split()))


def build_clip_tokenizer(words: list[str], length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """Trains byte pairs until each of `words` is one token; other words fall apart into smaller pieces."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(_CLIP_SPECIAL),
        initial_alphabet=alphabet,
        end_of_word_suffix=_END_OF_WORD,
    )
    learner.train_from_iterator([" ".join(words)], trainer)
    learned = learner.get_vocab()
    pieces = [token for token, _ in sorted(learned.items(), key=lambda item: item[1])]
    pieces += [character + _END_OF_WORD for character in alphabet if character + _END_OF_WORD not in learned]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=_merges(learner),
        model_max_length=length,
    )


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    """The merge rules of a trained byte-pair model, in the order of their rank."""
    rules = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in rules]


def build_t5_tokenizer(words: list[str], length: int = TEXT_LENGTH) -> T5Tokenizer:
    """A unigram vocabulary: each of `words` with and without a leading space, then single characters."""
    vocabulary: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    for word in words:
        # "mug," is one white-space word: its comma is a token without a leading space.
        piece = word if word in string.punctuation else _SPACE + word
        vocabulary[piece] = _WORD_SCORE
    for character in [_SPACE, *string.printable]:
        if character == _SPACE or not character.isspace():
            vocabulary.setdefault(character, _CHARACTER_SCORE)
    tokenizer = T5Tokenizer(vocab=list(vocabulary.items()), extra_ids=0, model_max_length=length)
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    return tokenizer
