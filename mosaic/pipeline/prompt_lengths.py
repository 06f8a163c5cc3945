"""What of a prompt the transformer does not read: T5 gets so many tokens, and the words beyond them are lost.

CLIP reads the first 77 tokens at most, and gives one pooled vector of them: that is how FLUX is made, and no word of it is told here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mosaic.files import shown
from mosaic.weights.components import component_folder

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer_2"  # of T5, in a FLUX pipeline
MOST_CAPTIONS = 10_000  # of a data set, which are looked at in a second or two
EXAMPLES = 3
Encode = Callable[[str], "Encoding | Words"]


class Words(NamedTuple):
    """A prompt as if every word were one token, with the fields of an `Encoding` that are read here."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    special_tokens_mask: list[int]


class LostWords(NamedTuple):
    """The end of a prompt that the model does not read.

    Attributes:
        num_tokens: Of the whole prompt, its end token included; where only its words were counted, the fewest that it can have.
        text_length: Tokens that are read, the end token included.
        words: What is lost, from the first word that is not read whole.
        by_words: Whether only words were counted, so that more may be lost.
    """

    num_tokens: int
    text_length: int
    words: str
    by_words: bool = False

    def __str__(self) -> str:
        """A clause: what there is, what is read and what is lost."""
        count = len(self.words.split())
        lost = f"its last {count} words are lost" if count > 1 else "its last word is lost"
        least = "at least " if self.by_words else ""
        return f"has {least}{self.num_tokens} tokens of T5, of which {self.text_length} are read: {lost}: {shown(self.words)}"


class TextWindow:
    """Finds what is lost of prompts, by the tokenizer of the model."""

    def __init__(self, encode: Encode, text_length: int) -> None:
        """Keep how prompts become tokens.

        Args:
            encode: A whole prompt to tokens, not cut and not padded.
            text_length: Tokens that are read, the end token included.
        """
        self._encode, self._text_length = encode, text_length

    @classmethod
    def of_model(cls, pretrained: str, text_length: int) -> "TextWindow":
        """The window of a model's own tokenizer, of which a few small files are read, and downloaded where the model is a hub id.

        Raises:
            FileNotFoundError, OSError, ValueError: There is no such model or tokenizer, or it cannot be reached or read.
        """
        return cls(_encoder(component_folder(pretrained, TOKENIZER)), text_length)

    @classmethod
    def of_tokenizer(cls, tokenizer: "PreTrainedTokenizerBase", text_length: int) -> "TextWindow":
        """The window of a loaded tokenizer."""

        def encode(prompt: str) -> "Encoding":
            found = tokenizer(prompt, truncation=False, padding=False, verbose=False).encodings
            assert found is not None  # transformers has tokenizers written in Python alone, but none of them is T5's
            return found[0]

        return cls(encode, text_length)

    @classmethod
    def of_words(cls, text_length: int) -> "TextWindow":
        """A window where no tokenizer is at hand: a word is at least one token, so that what it finds is lost for certain."""

        def encode(prompt: str) -> Words:
            places = [found.span() for found in re.finditer(r"\S+", prompt)]
            return Words([0] * (len(places) + 1), [*places, (0, 0)], [0] * len(places) + [1])

        return cls(encode, text_length)

    def lost(self, prompt: str) -> LostWords | None:
        """What is lost of a prompt; None: nothing."""
        encoding = self._encode(prompt)
        num_tokens = len(encoding.ids)
        if num_tokens <= self._text_length:
            return None
        # The end token is read in any case, so that it takes the place of a word's.
        places = [place for place, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special]
        start = places[max(self._text_length - (num_tokens - len(places)), 0)][0]
        while start and not prompt[start].isspace() and not prompt[start - 1].isspace():  # half a word is none
            start -= 1
        return LostWords(num_tokens, self._text_length, prompt[start:].strip(), isinstance(encoding, Words))

    def all_lost(self, prompts: Iterable[str]) -> Iterator[tuple[str, LostWords]]:
        """The prompts of which something is lost, each once, with what it is."""
        for prompt in dict.fromkeys(prompts):
            lost = self.lost(prompt)
            if lost is not None:
                yield prompt, lost


class CutCaptions(NamedTuple):
    """What of the captions of a data set is not read.

    Attributes:
        looked_at: Captions that were looked at.
        cut: Ids of those that are not read whole, and what is lost of each.
    """

    looked_at: int
    cut: list[tuple[str, LostWords]]

    def __str__(self) -> str:
        """A sentence."""
        if not self.cut:
            return f"all {self.looked_at:,} captions that were looked at are read whole."
        longest = max(self.cut, key=lambda entry: entry[1].num_tokens)
        shown_first = "; ".join(f"{name} {lost}" for name, lost in self.cut[:EXAMPLES])
        return (
            f"{len(self.cut):,} of {self.looked_at:,} captions are longer than model.text_length {longest[1].text_length} and are cut, the "
            f"longest has {longest[1].num_tokens} tokens. {shown_first}{'; ...' if len(self.cut) > EXAMPLES else '.'}"
        )


def cut_captions(window: TextWindow, captions: Sequence[tuple[str | None, str]]) -> CutCaptions:
    """Look at captions, spread evenly over all where there are many.

    Args:
        window: Of the model.
        captions: Ids, None where they are not known yet, and captions.
    """
    looked_at = list(enumerate(captions))[:: -(-len(captions) // MOST_CAPTIONS) or 1]
    lost = dict(window.all_lost(caption for _, (_, caption) in looked_at))
    cut = [(name or f"sample {number}", lost[caption]) for number, (name, caption) in looked_at if caption in lost]
    return CutCaptions(len(looked_at), cut)


def _encoder(folder: Path) -> Encode:
    """How the tokenizer of a folder makes tokens; its usual file is read without transformers, which takes seconds to import.

    Raises:
        OSError, ValueError: It cannot be read.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{file}: cannot be read as a tokenizer: {error}.") from error
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode  # one by one: a pool of threads would make the library complain of every process that is forked later
