"""The rules by which bases move, and what rules of one's own derive from."""

from oasis_fx.runtime.subspaces.rules import *  # noqa: F403
