"""The web app: python app.py"""

from __future__ import annotations

import sys

from webui.server import main

if __name__ == "__main__":
    sys.exit(main())
