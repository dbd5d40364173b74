import torch

# Threads that share tiny tensors spend their time waiting for each other, most of all on busy machines.
torch.set_num_threads(1)
