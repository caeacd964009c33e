"""URLs without their secrets: passwords, tokens and signatures."""

import re

NAMES_A_CONTAINER = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes of Azure, in which the text before ``@`` is the name of a container."""
URL = re.compile(
    r"""
    \b(?P<scheme>[A-Za-z][\w+.-]*)://
    (?P<user>
        [^\s/?\#]*@                          # user:password@
        | [^\s/?\#@:]*:(?!\d+[/?\#])[^\s]*@  # a password with a slash, as in user:pass/word@
    )?
    (?P<place>[^\s?\#'"]*)
    (?P<query>[?\#][^\s'"]*)?
    """,
    re.VERBOSE,
)


def without_secrets(text: str) -> str:
    """Remove user names, passwords, queries and fragments from all URLs in a text.

    Args:
        text: Text to store or to print.

    Example:
        >>> without_secrets("https://user:pass@host/set?token=abc is missing, hf://datasets/org/set@v1")
        'https://host/set is missing, hf://datasets/org/set@v1'
    """
    return URL.sub(_without_secrets, text) if "://" in text else text


def _without_secrets(url: re.Match[str]) -> str:
    user = url["user"] or ""
    if url["scheme"].lower() in NAMES_A_CONTAINER and ":" not in user:
        return f"{url['scheme']}://{user}{url['place']}"
    return f"{url['scheme']}://{url['place']}"
