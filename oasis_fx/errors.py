"""Warnings of oasis_fx."""


class OasisWarning(UserWarning):
    """Something was left undone; training goes on, and is right, without it."""
