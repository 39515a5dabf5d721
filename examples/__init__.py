"""Scripts to copy: each runs on a CPU in one to five minutes, `--quick` in less; docs/examples has a page of each."""
