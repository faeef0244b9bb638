"""Looking at runs from outside: which there are, and what each of them does."""
