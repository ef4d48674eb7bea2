"""What tests ask of a message: that it names an option, a value, a file. Its words are free to change."""

import re


def names(*values: object) -> str:
    """A pattern for `pytest.raises(match=...)`: a message that names these, in any order; spaces part several."""
    words = [word for value in values for word in str(value).split()]
    return r"(?s)\A" + "".join(f"(?=.*{_whole(word)})" for word in words)


def says(message: str, *values: object) -> bool:
    """Whether a message names these."""
    return re.search(names(*values), message) is not None


def _whole(word: str) -> str:
    """The word, but not as a part of a longer one."""
    before, after = (r"(?<!\w)" if word[0].isalnum() else "", r"(?!\w)" if word[-1].isalnum() else "")
    return before + re.escape(word) + after
