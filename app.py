"""The web app: python app.py"""

from __future__ import annotations

from webui.page import build_page
from webui.settings import Settings

if __name__ == "__main__":
    build_page(Settings()).launch()
