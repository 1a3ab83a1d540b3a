"""Settings for all tests."""

import torch

# The models are tiny and the tests run in two processes: more threads per process would only wait for each other.
torch.set_num_threads(1)
