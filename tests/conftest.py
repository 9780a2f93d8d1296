"""Set-up for all tests."""

import torch

# The models of the tests are so small that a second thread only adds waiting, on a busy machine a hundredfold.
torch.set_num_threads(1)
