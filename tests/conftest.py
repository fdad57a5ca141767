import os

import torch
from hypothesis import settings

# A loaded machine must not fail a property; in CI the same examples run every time.
settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=75, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Tensors here have a few dozen elements: threads only wait for each other.
torch.set_num_threads(1)
