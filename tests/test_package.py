"""The package as a whole: its version."""

import re

import keras_bn


def test_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", keras_bn.__version__)
