"""The look of the page: Gradio's theme variables, and a style sheet for everything else."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

STYLE = Path(__file__).with_name("style.css")
FAVICON = Path(__file__).with_name("favicon.svg")
# The image of the page on social networks.
CARD = Path(__file__).with_name("card.png")
# System fonts, so that nothing is loaded from other servers.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
# The theme's variables that differ from the default.
SETTINGS = {
    "body_background_fill": "*neutral_50",
    "body_background_fill_dark": "*neutral_950",
    # Also the background of the sign-in page, which has no style sheet.
    "background_fill_primary": "*neutral_50",
    "background_fill_primary_dark": "*neutral_950",
    "background_fill_secondary_dark": "*neutral_950",
    # A contrast of at least 4.5 to 1, as WCAG AA requires.
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "*neutral_400",
    "color_accent": "*primary_700",
    "link_text_color": "*primary_700",
    "link_text_color_dark": "*primary_300",
    "link_text_color_hover": "*primary_800",
    "link_text_color_hover_dark": "*primary_200",
    "link_text_color_visited": "*primary_700",
    "link_text_color_visited_dark": "*primary_300",
    "block_background_fill": "white",
    "block_background_fill_dark": "*neutral_900",
    "block_border_width": "1px",
    "block_shadow": "none",
    "block_label_background_fill": "transparent",
    "block_label_background_fill_dark": "transparent",
    "block_title_text_weight": "600",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "button_primary_text_color": "white",
    "button_cancel_background_fill": "white",
    "button_cancel_background_fill_dark": "*neutral_900",
    "button_cancel_background_fill_hover": "#fef2f2",
    "button_cancel_background_fill_hover_dark": "#450a0a",
    "button_cancel_border_color": "#dc2626",
    "button_cancel_border_color_dark": "#f87171",
    "button_cancel_text_color": "#b91c1c",
    "button_cancel_text_color_dark": "#fca5a5",
    "button_border_width": "1px",
    "button_large_text_weight": "600",
    "input_border_width": "1px",
    "input_background_fill": "white",
    "input_background_fill_dark": "*neutral_800",
    "input_border_color": "*neutral_300",
    "input_border_color_dark": "*neutral_600",
}


def theme() -> gr.themes.Base:
    """The theme: one accent colour, plain surfaces, the same contrast in light and dark mode."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=SANS,
        font_mono=MONO,
    ).set(**SETTINGS)
