"""Placeholders of pictures in prompts, such as `<image_1>` or `<img><|image_1|></img>`: words take their place, or they go."""

import re
from collections.abc import Sequence

COMMON = r"(?:<img>\s*)?<\|?(?:image|img|picture|reference|ref)[ _-]?(\d{0,3})\|?>(?:\s*</?img>)?"
_LEFT = re.compile(rf"{COMMON}|</?(?:img|image)\b[^>]*>", re.IGNORECASE)
TEMPLATE = re.compile(r"\{(number|phrase)\}")


def problem_of_template(template: str) -> str | None:
    """What is wrong with a template in a mapping, None if nothing is."""
    if re.search(r"[{}]", TEMPLATE.sub("", template)):
        return 'must hold no braces but those of "{number}" and "{phrase}"'
    return "must not be a placeholder itself" if _LEFT.search(TEMPLATE.sub("1", template)) else None


def resolve(
    prompt: str, phrases: Sequence[str | None], template: str | None, form: str | None = None, start: int = 1
) -> tuple[str, list[str | None]]:
    """Replace the placeholders of a prompt.

    Args:
        prompt: The prompt.
        phrases: What the references are called, "" where it is not known; None in place of one that is not there.
        template: The words in their place: "{phrase}" is the reference's phrase, "{number}" its number from 1; "": the placeholders are
            taken away; None: a prompt with placeholders is refused.
        form: How they are written, such as "[IMG{number}]"; None: in angle brackets. Without numbers they are counted.
        start: The number of the first reference in them.

    Returns:
        The prompt; and the words in place of every reference's first placeholder, None where it has none.

    Raises:
        ValueError: A placeholder would be left, or names no reference, or a phrase that is asked for is not known.
    """
    pattern = re.compile(COMMON, re.IGNORECASE)
    if form is not None:
        pattern = re.compile(re.escape(form).replace(re.escape("{number}"), r"(\d{0,3})"))
    found = list(pattern.finditer(prompt))
    if found and template is None:
        raise ValueError(
            f'must hold no placeholder, got {found[0][0]}. Say in the mapping what takes its place: placeholder_words "{{phrase}}", '
            '"image {number}", or "" to take it away.'
        )
    numbers = [int(match[1]) - start if match[1] else None for match in found]
    if None in numbers and any(number is not None for number in numbers):
        raise ValueError(f"must number all placeholders or none, got {' and '.join(match[0] for match in found[:5])}.")
    words: list[str | None] = [None] * len(phrases)
    pieces, end = [], 0
    for count, (match, number) in enumerate(zip(found, numbers, strict=True)):
        k = count if number is None else number
        phrase = phrases[k] if 0 <= k < len(phrases) else None
        if phrase is None:
            there = ", ".join(str(j + start) for j, known in enumerate(phrases) if known is not None)
            raise ValueError(f"the placeholder {match[0]} names no reference; there are {there or 'none'}.")
        put = _words(template or "", k, phrase, match[0])
        words[k] = words[k] or put or None
        pieces += [prompt[end : match.start()], put]
        end = match.end()
    text = "".join([*pieces, prompt[end:]])
    if found and not template:
        text = re.sub(r" +([,.;:!?])", r"\1", re.sub(r"[ \t]{2,}", " ", text))
    if left := _LEFT.search(text):
        raise ValueError(f"must hold no placeholder, but {left[0]} would be left. Say its form in the mapping: placeholder_form.")
    return text.strip(), words


def _words(template: str, k: int, phrase: str, placeholder: str) -> str:
    """The words in place of a placeholder of reference k."""
    if "{phrase}" in template and not phrase:
        raise ValueError(f"the placeholder {placeholder} needs a phrase of its reference, which has none.")
    return TEMPLATE.sub(lambda match: str(k + 1) if match[1] == "number" else phrase, template)
