"""What a launch raises."""


class PTXError(RuntimeError):
    """The kernel did what a GPU would not forgive, or the launch itself is impossible."""


class UnsupportedError(PTXError):
    """PTX that this interpreter does not know. It never guesses: an unknown instruction fails when a thread reaches
    it.
    """
