"""What an error offers to type, taken from its fix."""

import re

from recipes.errors import LimiError

_WORD = re.compile(r"(?:[a-z][a-z0-9_]*\.)*[a-z][a-z0-9_]*=\S+")


def offered(error: LimiError) -> list[list[str]]:
    """The alternatives of a fix, each the overrides that are typed together; one with a name to fill in is left out."""
    texts = error.fix.split("; ")[0]
    found = [[word.rstrip(",;.") for word in _WORD.findall(text)] for text in re.split(r",? or ", texts)]
    return [words for words in found if words and not any(re.search(r"=.*[A-Z]{3}", word) for word in words)]


def with_words(words: list[str], new: list[str]) -> list[str]:
    """The command's words with others in the place of those of the same name."""
    names = {word.partition("=")[0] for word in new}
    return [word for word in words if word.partition("=")[0] not in names] + new
