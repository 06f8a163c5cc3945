"""The page's colours, light and dark: those of Gradio's base theme with slate and indigo, but texts have a contrast of 4.5 (WCAG 2.2)."""

FAMILIES = {"primary_hue": "indigo", "neutral_hue": "slate", "radius_size": "lg"}
WHITE, SLATE = "#ffffff", {50: "#f8fafc", 100: "#f1f5f9", 200: "#e2e8f0", 300: "#cbd5e1", 400: "#94a3b8", 500: "#64748b", 600: "#475569"}
SLATE |= {700: "#334155", 800: "#1e293b", 900: "#0f172a", 950: "#0a0f1e"}
COLOURS = {  # by Gradio's names of variables: (light, dark)
    "background_fill_primary": (WHITE, SLATE[950]),
    "background_fill_secondary": (SLATE[50], SLATE[900]),
    "block_background_fill": (WHITE, SLATE[800]),
    "input_background_fill": (SLATE[100], SLATE[700]),
    "code_background_fill": (SLATE[100], SLATE[800]),
    "button_primary_background_fill": ("#4f46e5", "#4f46e5"),
    "button_secondary_background_fill": (SLATE[200], SLATE[600]),
    "body_text_color": (SLATE[800], SLATE[100]),
    "body_text_color_subdued": (SLATE[600], SLATE[300]),
    "block_info_text_color": (SLATE[600], SLATE[300]),
    "block_label_text_color": (SLATE[600], SLATE[200]),
    "block_title_text_color": (SLATE[600], SLATE[200]),
    "input_placeholder_color": (SLATE[600], SLATE[300]),
    "button_primary_text_color": (WHITE, WHITE),
    "button_secondary_text_color": ("#000000", WHITE),
    "link_text_color": ("#2563eb", "#60a5fa"),
}
TEXTS = {  # on what each text stands
    "body_text_color": ("background_fill_primary", "background_fill_secondary", "block_background_fill", "input_background_fill"),
    "body_text_color_subdued": ("background_fill_primary", "background_fill_secondary", "block_background_fill", "input_background_fill"),
    "block_info_text_color": ("background_fill_primary", "block_background_fill"),
    "block_label_text_color": ("background_fill_primary", "background_fill_secondary", "block_background_fill"),
    "block_title_text_color": ("background_fill_primary", "block_background_fill"),
    "input_placeholder_color": ("background_fill_primary", "block_background_fill", "input_background_fill"),
    "button_primary_text_color": ("button_primary_background_fill",),
    "button_secondary_text_color": ("button_secondary_background_fill",),
    "link_text_color": ("background_fill_primary", "block_background_fill"),
}


def theme_values() -> dict[str, str]:
    """The colours as arguments of the `set` of Gradio's themes."""
    return {f"{name}{ending}": value for name, values in COLOURS.items() for ending, value in zip(("", "_dark"), values, strict=True)}
