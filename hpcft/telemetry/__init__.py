"""What happened in a run, as files: events, the table of ranks, the summary."""
