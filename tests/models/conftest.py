"""Real images for the tests of the models, where they can be had."""

import pytest

from models import data


@pytest.fixture(scope="session")
def fashion_mnist():
    """All of Fashion-MNIST, as `make data` has fetched it."""
    try:
        return data.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))
