"""What the tests of generation share."""

import pytest

from dit_accel.cli.app import main


@pytest.fixture
def run():
    """Runs `dit-accel` with these arguments; returns its exit status, and leaves what is printed to the test."""

    def verb(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code

    return verb
