"""The app with a stand-in for the trainers: python tests/webui/stand_in_app.py, with the options of app.py."""

import sys
from pathlib import Path

from webui import launching
from webui.server import main

TRAINER = Path(__file__).with_name("stand_in_trainer.py")


def standing_for_training(words):
    """The arguments of a command with the stand-in in place of accelerate."""
    return [sys.executable, str(TRAINER), *words[1:]]


if __name__ == "__main__":
    launching._with_launcher = standing_for_training
    sys.exit(main())
