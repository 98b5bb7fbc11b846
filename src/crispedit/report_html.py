"""A report as one page of HTML that works offline: the template with the data in it.

The template, report.html, is a page of its own with an empty place for the data; it can be opened and edited as it is.
Answers and prompts are not to be trusted. They are in the page as JSON without ``<``, ``>`` and ``&``, so that no text
can end the element it stands in; the template's script makes text nodes of them, never markup; and the page's content
security policy lets no other script run than the template's, which it names by its hash, and nothing be fetched.
"""

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

TEMPLATE = "report.html"
_DATA = '<script type="application/json" id="data">null</script>'
_POLICY = "script-src 'unsafe-inline'"
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def html(report: dict[str, Any]) -> str:
    """The page of a report.

    Args:
        report: See :func:`crispedit.report.report_data`.

    Returns:
        HTML.
    """
    page = files("crispedit").joinpath(TEMPLATE).read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    return page.replace(_POLICY, f"script-src 'sha256-{digest}'", 1).replace(_DATA, _DATA.replace("null", data), 1)
