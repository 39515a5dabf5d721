"""Scripts to copy: each runs on a CPU in a minute or three, `--quick` in seconds; docs/examples has a page of each."""
