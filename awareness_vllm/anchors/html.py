"""HTML to plain text with the standard library, with line breaks where a browser has them."""

from __future__ import annotations

from html.parser import HTMLParser

from awareness_vllm.anchors.words import words_of

DROPPED = frozenset({"script", "style", "nav", "head", "template", "noscript", "svg"})
BLOCKS = words_of(
    "address article aside blockquote body br dd div dl dt fieldset figcaption figure footer form "
    "h1 h2 h3 h4 h5 h6 header hr li main ol p pre section table td th tr ul"
)
# These close a paragraph, so an empty line goes with them.
PARAGRAPHS = words_of("blockquote dl h1 h2 h3 h4 h5 h6 ol p pre table ul")


def html_to_text(html: str) -> str:
    """The readable text of a page; broken HTML is no error."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.dropped: list[str] = []
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            # HTML lets a page leave `</head>` out.
            self.dropped.clear()
        if tag in DROPPED:
            self.dropped.append(tag)
        self.verbatim += tag == "pre"
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.dropped:
            # An unclosed element inside ends with the outer one.
            del self.dropped[self.dropped.index(tag) :]
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self.dropped:
            return
        if self.verbatim:
            self.parts.append(data)
            return
        # Line breaks of the source are spaces; those at the ends separate inline elements.
        words = " ".join(data.split())
        before = " " if data[:1].isspace() and not self._at_line_start() else ""
        after = " " if words and data[-1:].isspace() else ""
        if words:
            self.parts.append(before + words + after)
        elif before:
            self.parts.append(" ")

    def _at_line_start(self) -> bool:
        return not self.parts or self.parts[-1][-1:] in ("\n", " ")

    def _break(self, tag: str) -> None:
        if tag in BLOCKS and not self.dropped:
            self.parts.append("\n\n" if tag in PARAGRAPHS else "\n")
