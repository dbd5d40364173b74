"""The web app from an installed package: nora-vision app, or python -m webui."""

from __future__ import annotations

import sys

from webui.server import main

if __name__ == "__main__":
    sys.exit(main())
