"""Small tokenizers of the pocket FLUX: real CLIPTokenizer and T5Tokenizer classes, one token per caption word.

The vocabularies are learnt from the captions of the pocket world alone. Every byte (CLIP) or printable ASCII character
(T5) is also a token, so words that no caption holds are spelt out character by character instead of being lost.
"""

import itertools
import string
from collections.abc import Iterable

from tokenizers import decoders, pre_tokenizers
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


def known_words(tokenizer: T5Tokenizer) -> set[str]:
    """The words that `build_t5_tokenizer` was given, but for punctuation."""
    return {piece[1:] for piece in tokenizer.get_vocab() if piece.startswith(_SPACE)} - {""}


def build_clip_tokenizer(words: list[str], length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """Byte pairs under which each of `words` is one token; other words fall apart into smaller pieces.

    The rules are written down and not learnt: a trainer breaks ties differently in every process.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := _byte_pairs(word, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    tokens = [*_CLIP_SPECIAL, *alphabet, *(character + _END_OF_WORD for character in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=length)


def _byte_pairs(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of an ASCII word: again and again the neighbours of the lowest rank are joined."""
    pieces = [*word[:-1], word[-1] + _END_OF_WORD]
    while known := [(merges[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in merges]:
        i = min(known)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


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
