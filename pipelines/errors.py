"""The error for wrong input of the user."""


class InputError(ValueError):
    """An image, folder, file or option cannot be used; the message names it, what is allowed, and the remedy.

    Characters that cannot be written as UTF-8, such as parts of a file's name, are escaped in the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))
