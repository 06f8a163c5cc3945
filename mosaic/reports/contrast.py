"""Colours that can be read: contrast as WCAG 2.2 measures it, and the shade of a share with an ink that stands out on it."""

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255
SHADE: Colour = (29, 78, 137)  # of a share of 1
STEEPNESS = 0.8  # small shares are drawn a little darker than they are
DARKEST = 0.92


def luminance(colour: Colour) -> float:
    """Relative luminance, from 0 (black) to 1 (white)."""
    linear = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Colour, other: Colour) -> float:
    """From 1 (the same) to 21 (black and white). Text wants 4.5 (WCAG 2.2, 1.4.3)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def shaded(share: float) -> Colour:
    """White for a share of 0, the darker the larger."""
    weight = min(max(share, 0), 1) ** STEEPNESS * DARKEST
    red, green, blue = (round(255 + weight * (value - 255)) for value in SHADE)
    return red, green, blue


def shade(share: float) -> str:
    """The style of a cell that shows a share: its background, and black or white, one of which has a contrast of 4.5 on any colour."""
    back = shaded(share)
    ink = max(((0, 0, 0), (255, 255, 255)), key=lambda colour: contrast(colour, back))
    return f"background:{hexadecimal(back)};color:{hexadecimal(ink)}"


def hexadecimal(colour: Colour) -> str:
    """As HTML writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
