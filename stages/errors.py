"""The two ways a user is told that something went wrong."""


class BadInput(Exception):
    """Something the user can mend before any work starts; the command line ends with code 2.

    The message is one line: file, field, reason, remedy.
    """


class StageFailed(Exception):
    """A stage could not finish; its node keeps no manifest and the command line ends with code 1.

    The message is one line that says what happened and what to do about it.
    """
