import torch

# Threads only slow down tiny tensors, especially on busy machines.
torch.set_num_threads(1)
