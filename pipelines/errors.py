"""The error for what a user gave and what cannot be used."""


class InputError(ValueError):
    """An image, folder, file or option cannot be used; the message names it, what is allowed, and the remedy.

    What of the message is not UTF-8, such as part of a file's name, is escaped, so that it can be written anywhere.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))
