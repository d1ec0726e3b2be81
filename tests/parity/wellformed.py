"""Check that an HTML page is well-formed, and collect what it would fetch."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "rect", "line", "circle", "path"}


class WellFormed(HTMLParser):
    """Checks that every element is closed in order, and collects the URLs that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()


def parse(html):
    page = WellFormed()
    page.feed(html)
    page.close()
    assert not page.open
    return page
