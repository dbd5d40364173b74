"""How the commands print their help."""

from __future__ import annotations

from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

USAGE = "%(prog)s [options]"


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults except None, whose meaning the help text says; descriptions as written; each flag in its first spelling only."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        if len(action.option_strings) < 2 or not action.option_strings[0].startswith("--"):
            return super()._format_action_invocation(action)
        first = Action(action.option_strings[:1], action.dest, action.nargs, choices=action.choices, metavar=action.metavar)
        return super()._format_action_invocation(first)
