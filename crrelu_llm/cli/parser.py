"""The option parser of the commands, whose errors are one line, like every other wrong input."""

import argparse
from typing import Any, NoReturn

from crrelu_llm.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are InputErrors instead of a usage text of several lines."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises InputError with argparse's message, on one line."""
        raise InputError(f"{' '.join(message.split())}; see `{self.prog} --help`")
