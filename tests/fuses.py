"""A fault that comes when it is told to: what is kept has to outlive it."""


class PowerCutError(Exception):
    """Ends a run at once."""


class Fuse:
    """Blows at one of its calls, counted from 1."""

    made, at = 0, 0

    def set(self, at):
        self.made, self.at = 0, at

    def __call__(self):
        self.made += 1
        if self.made == self.at:
            raise PowerCutError
