"""What Slurm tells of the allocation and the step a process is in."""
