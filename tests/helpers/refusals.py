"""What a call is refused with: one line, whatever was wrong."""

import pytest


def refusal(call, *arguments, error=ValueError) -> str:
    """Return the one line of the error that a call must raise."""
    with pytest.raises(error) as raised:
        call(*arguments)
    message = str(raised.value)
    assert message.splitlines() == [message]
    return message
