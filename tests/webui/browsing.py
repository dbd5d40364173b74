"""How a person finds a screen."""

from webui.page import SCREENS


def go_to(page, screen, patience=180_000):
    """Open a screen, however narrow the page is: what does not fit is behind the three dots."""
    # Until the page has found its width, each tab is there twice, or not to be seen.
    page.wait_for_function("document.querySelectorAll('#screen-photos-button').length === 1", timeout=patience)
    more = page.locator("#screens > .tab-wrapper .overflow-menu")
    tab = page.locator(f"#screen-{screen}-button")
    tab.or_(more.locator("> button")).locator("visible=true").first.wait_for(timeout=patience)
    if not tab.is_visible():
        more.locator("> button").click(timeout=patience)
        tab = more.locator(".overflow-dropdown button", has_text=SCREENS[screen][0])
    tab.click(timeout=patience)
    page.locator(f"#screen-{screen}[role=tabpanel]").wait_for(state="visible", timeout=patience)
