"""PyTorch training on the recoverable world."""
