"""What lives between steps: subspaces, low-rank gradients, optimizers. It knows torch only."""

if __name__ != "oasis_fx.runtime":
    # At the repository root this folder is importable by accident; its classes would then exist twice.
    raise ImportError("import this package as oasis_fx.runtime, not as runtime")
