import pytest

from helpers import toys


@pytest.fixture
def recorder():
    return toys.PathRecorder()
