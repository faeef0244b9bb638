"""What differs by ``--mode``: how the ranks that train work together."""
