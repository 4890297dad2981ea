"""Errors that are the user's to fix: shown as one message, without a traceback."""


class UserError(Exception):
    """Bad input or environment; the message names the place and the fix."""
