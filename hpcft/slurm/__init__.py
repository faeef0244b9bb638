"""What Slurm tells about the step a process runs in."""
