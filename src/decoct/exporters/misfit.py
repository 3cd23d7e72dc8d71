"""What a format cannot express, said so that whoever asked can mend it."""


class MisfitError(ValueError):
    """A format cannot express something of a model.

    Attributes:
        what: what it cannot hold, and why.
        wanted: what it takes instead, as advice.
    """

    def __init__(self, what: str, wanted: str, advice: str) -> None:
        """Say `what` and `advice`; who can still change what the model is made of has more use for `wanted`."""
        super().__init__(f"{what}; {advice}")
        self.what = what
        self.wanted = wanted
