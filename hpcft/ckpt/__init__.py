"""Checkpoints: asynchronous, in standard HDF5, committed or absent."""
