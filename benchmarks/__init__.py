"""One file a question, each with its peers in one run."""
