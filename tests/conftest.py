import torch
from hypothesis import settings

# A loaded machine must not fail a property. The same examples run every time; others are
# tried by `pytest --hypothesis-profile=explore`.
settings.register_profile(
    "fixed", deadline=None, max_examples=50, derandomize=True, print_blob=True
)
settings.register_profile("explore", deadline=None, max_examples=200)
settings.load_profile("fixed")

# Tensors here have a few dozen elements: threads only wait for each other.
torch.set_num_threads(1)
