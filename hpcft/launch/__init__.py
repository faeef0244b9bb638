"""Starting ranks: local and Slurm front ends, shepherds, and what a machine can do."""
