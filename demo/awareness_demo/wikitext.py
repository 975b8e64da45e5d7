"""MediaWiki markup as plain text."""

from __future__ import annotations

import html
import re

# Sections that are lists of works and links rather than prose; everything after them is dropped.
_BACK_MATTER = re.compile(
    r"\n==+ *(?:See also|References|Notes|Footnotes|External links|Further reading|Bibliography)"
)
_RULES = tuple(
    (re.compile(pattern, re.DOTALL | re.MULTILINE), by)
    for pattern, by in (
        (r"<!--.*?-->", ""),
        (r"<ref[^>/]*/>", ""),
        (r"<(ref|math|gallery|table|div|imagemap|timeline)\b.*?</\1>", ""),
        (r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", ""),
        (r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1"),
        (r"\[https?://\S+ ?([^\]]*)\]", r"\1"),
        (r"'{2,}", ""),
        (r"<[^>]+>", ""),
        (r"^=+ *(.*?) *=+$", r"\1"),
        (r"^[*#:;]+ *", "- "),
        (r"\(\s*[,;]?\s*\)", ""),
        (r"[^\S\n]+", " "),
        (r"\n{3,}", "\n\n"),
    )
)


def wikitext_to_text(markup: str) -> str:
    """An article's prose, headings and lists; no templates, tables, references, pictures."""
    text = _BACK_MATTER.split(html.unescape(html.unescape(markup)), maxsplit=1)[0]
    text = _without_nested(_without_nested(text, "{{", "}}"), "{|", "|}")
    for pattern, by in _RULES:
        text = pattern.sub(by, text)
    return text.strip()


def _without_nested(text: str, begin: str, end: str) -> str:
    """A text without the parts between two marks, which may be nested; an open mark takes the
    rest."""
    parts, depth, last = [], 0, 0
    for match in re.finditer(f"{re.escape(begin)}|{re.escape(end)}", text):
        if depth == 0:
            parts.append(text[last : match.start()])
        depth = max(0, depth + (1 if match[0] == begin else -1))
        last = match.end()
    return "".join([*parts, text[last:] if depth == 0 else ""])
