"""hpcft: PyTorch training that survives the loss of ranks and nodes in place.

Importing this package is cheap on purpose: it starts neither MPI nor torch.
"""

from __future__ import annotations

__version__ = "0.1.0"
