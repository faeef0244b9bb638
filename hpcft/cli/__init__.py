"""The hpcft command: argument parsing and printing, no logic of its own."""
