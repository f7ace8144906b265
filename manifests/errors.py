"""Errors meant for the person at the command line: what was found, where, and what to do next."""


class FlawsmithError(Exception):
    """A problem the user can act on. The message names the file, the field and the remedy."""


class UsageError(FlawsmithError):
    """The command or its configuration is wrong; nothing was started (exit code 2)."""


class WorkspaceError(FlawsmithError):
    """The workspace lacks something, is in use, or holds what it should not."""


class ReadOnlyError(WorkspaceError):
    """Nothing can be written where the workspace lies."""


class PictureError(FlawsmithError, ValueError):
    """A picture that cannot be used. Deterministic: reading the same bytes again fails the same way."""
