"""Scripts to copy: each runs on a CPU in one to five minutes, `--quick` in seconds; docs/examples has a page of each."""
