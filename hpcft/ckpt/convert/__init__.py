"""Checkpoints to and from the formats of others: safetensors, DCP, torch.save."""
