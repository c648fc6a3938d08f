"""What every page that a command writes must be."""

import html.parser
import json
import re


class Checker(html.parser.HTMLParser):
    """Counts open elements and collects addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.bad = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for key, value in attributes if key in ("src", "href") and value]
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)


def check_page(path):
    """The page's data. Asserts that it is well-formed and asks nothing of the network."""
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(re.sub(r"(?s)<svg.*?</svg>|<p>(?=<noscript>)", "", text))
    assert not checker.bad
    assert not [a for a in checker.addresses if not a.startswith(("data:", "#"))]
    outside = re.findall(r"https?://[^\s\"'<)]+", re.sub(r"(?s)<svg.*?</svg>", "", text))
    assert not outside
    return json.loads(re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', text)[1])
