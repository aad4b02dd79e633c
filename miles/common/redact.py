"""Secrets in URLs: refused where a URL is given, cut out of text that is shown.

s3://KEY:SECRET@bucket/x               refused: paths are kept in the manifest and the ledger
https://host/x.jsonl?X-Amz-Signature=… refused likewise
403 for url: https://host/x?sig=abc    shown as: 403 for url: https://host/x?…
"""

from __future__ import annotations

import re

from miles.errors import SourceError

# A colon before an @ that is not a port's, of an ARN, or of chained URLs (zip://a::s3://b).
_USER_AND_PASSWORD = re.compile(r"://(?!arn:)[^\s/?#\[@:]*:(?!:|\d+(?:/|\s|$))\S*@")
# A token may stand alone, without a colon.
_WEB_USER = re.compile(r"(?<=http://)[^\s/?#@]*@|(?<=https://)[^\s/?#@]*@")
_QUERY = re.compile(r"(https?://[^\s?#'\"<>]*)\?[^\s'\"<>]*=[^\s'\"<>]*")


def redact(text: str) -> str:
    """Return a text without the passwords and queries of its URLs."""
    return _QUERY.sub(r"\1?…", _WEB_USER.sub("…@", _USER_AND_PASSWORD.sub("://…@", text)))


def require_no_secret(url: str) -> None:
    """Refuse a URL with a secret.

    Raises:
        SourceError: the URL holds a password, or a query, which may be a signature.
    """
    if redact(url) != url:
        raise SourceError(
            f"{redact(url)}: the URL holds a password or a query, and it would be written into the "
            "run's files. Credentials come from the environment (for s3:// AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE; for hf:// HF_TOKEN): give the URL without them"
        )
