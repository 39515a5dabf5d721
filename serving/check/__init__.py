"""Checks what Docker and Kubernetes run, without a Docker daemon: `make docker-check`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "fashion_cnn"


class CheckError(Exception):
    """Something is not as it has to be; the message says what."""


class Skipped(Exception):
    """A check needs what is not here; the message says what, and how to get it."""
