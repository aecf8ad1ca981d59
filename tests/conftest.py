"""The tiny models gain nothing from several threads, and threads that wait for a busy core lose a lot."""
import torch

torch.set_num_threads(1)
