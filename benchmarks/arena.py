"""The arena, for `accelerate launch`: as many cells run at once as it starts processes.

    accelerate launch --num_processes 2 benchmarks/arena.py --subjects_dir SUBJECTS --methods all

`nora-vision arena` and `python -m training.arena` do the same on one worker.
"""

from __future__ import annotations

from training.arena import main
from training.engine.console import configure_logging
from training.engine.stopping import exit_codes
from training.options.arena import parse_arena_options

if __name__ == "__main__":
    with configure_logging(), exit_codes():
        main(parse_arena_options(description=__doc__))
