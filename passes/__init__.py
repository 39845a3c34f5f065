"""Analyses and rewrites of joint forward-backward graphs. They know torch and oasis_fx.graph only."""

if __name__ != "oasis_fx.passes":
    # At the repository root this folder is importable by accident; its classes would then exist twice.
    raise ImportError("import this package as oasis_fx.passes, not as passes")
