"""Messages of a conversation as they come from outside: checked before any model sees them. Plain Python."""

from typing import Any

from textgen_cli.errors import InputError


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as chat templates take them; InputError E-FIELD says what is wrong."""
    if not isinstance(messages, list) or not messages:
        raise InputError("E-FIELD", "messages", "must be a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError("E-FIELD", f"messages[{number}]", "must be an object with a role and a content")
        if not isinstance(message.get("content"), str):
            raise InputError("E-FIELD", f"messages[{number}].content", "must be a text")
    return messages
