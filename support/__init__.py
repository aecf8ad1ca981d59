"""What the command needs and the method does not."""


class UserError(ValueError):
    """Something that the user can fix. The command prints it in one line and exits with status 2.
    The message names the value and the fix."""


class RunError(RuntimeError):
    """A run that cannot go on: memory or disk is full, or another process ended. The command prints
    it in one line and exits with status 1. The message says how to go on."""
