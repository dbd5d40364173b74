"""The error for what a user gave and what cannot be used."""


class InputError(ValueError):
    """A picture, folder, file or option cannot be used; the message names it, what is allowed, and the remedy."""
