"""``oasis-fx plan``: the memory of a training step, predicted on fake tensors."""
