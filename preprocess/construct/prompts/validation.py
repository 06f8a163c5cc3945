"""What a prompt must be, whoever wrote it."""

import re
import unicodedata
from collections.abc import Sequence

from preprocess.construct.prompts.settings import MAX_SUBJECTS

MAX_LETTERS = 2000


def normalised(text: str) -> str:
    """A text in the form in which two that say the same are equal: small letters and digits, one blank between words."""
    letters = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", letters))


def spans_of(text: str, phrases: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where each phrase stands in a text, letter by letter, as whole words and apart from the others; None: not all do.

    The longest phrase takes its first place, then the next: "a cat" is not found in "a cat with a hat" where that is a phrase, too.
    """
    found: dict[int, tuple[int, int]] = {}
    for k in sorted(range(len(phrases)), key=lambda k: -len(phrases[k])):
        places = (match.span() for match in re.finditer(rf"(?<!\w){re.escape(phrases[k])}(?!\w)", text))
        free = next((place for place in places if all(place[1] <= first or end <= place[0] for first, end in found.values())), None)
        if free is None or not phrases[k]:
            return None
        found[k] = free
    return [found[k] for k in range(len(phrases))]


def problem_of(prompt: str, caption: str, phrases: Sequence[str]) -> str:
    """Why texts are no prompt and caption of subjects; "": they are.

    Args:
        prompt: What the picture is made from.
        caption: What training reads.
        phrases: What they call the subjects, in the order of the prompt.
    """
    if not 1 <= len(phrases) <= MAX_SUBJECTS:
        return f"there must be one to {MAX_SUBJECTS} subjects, got {len(phrases)}"
    for name, text in (("prompt", prompt), ("caption", caption)):
        if not text.strip() or len(text) > MAX_LETTERS or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
            return f"the {name} must be one line of 1 to {MAX_LETTERS} letters"
    if len({normalised(phrase) for phrase in phrases}) < len(phrases):
        return "the phrases must differ from each other"
    spans = spans_of(prompt, phrases)
    if spans is None:
        return "each phrase must stand letter by letter in the prompt, apart from the others"
    if spans != sorted(spans):
        return "the phrases must come in the order of the prompt"
    if spans_of(caption, phrases) is None:
        return "each phrase must stand letter by letter in the caption, apart from the others"
    return ""
