"""Masks as plain text: `Assistant: [[...]]` for what is trained, for reviews, tests and mails.

The text is exact (white space, line breaks) and the brackets are unambiguous: where the data itself holds one of the
signs, a backslash stands in front of it.
"""

import re
from itertools import groupby

from torchmask.data.inspection import Document
from torchmask.data.readable import Readable

_BEFORE_SIGNS = re.compile(r"(\\*)([\[\]~])|(\\+)\Z")
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "\u2421"}
_LIKE_A_WEIGHT = re.compile(r"-?[\d.][\d.e+-]*:")


def bracketed(document: Document, read: Readable) -> str:
    """The document's text: trained runs in `[[...]]`, of another weight than 1 in `[[0.5:...]]`, hidden in `~~...~~`.

    >>> import numpy as np
    >>> weights = np.array([0, 1, 0.5], np.float32)
    >>> document = Document("a:1", np.array([3, 4, 3]), np.array([3, 0, 0], np.uint8), weights, None, -1)
    >>> bracketed(document, Readable([3, 4], {3: "a", 4: "[[b"}.__getitem__))
    '~~a~~[[\\\\[\\\\[b]][[0.5:a]]'
    """
    weights, hidden = document.weights.tolist(), document.hidden.tolist()
    parts = []
    for (weight, is_hidden), run in groupby(range(len(weights)), key=lambda k: (weights[k], hidden[k])):
        text = escaped(read.text([int(document.tokens[k]) for k in run]))
        text = f"~~{text}~~" if is_hidden else text
        if weight:
            bare = weight == 1 and not _LIKE_A_WEIGHT.match(text)  # `12:30` would read as a weight
            text = f"[[{text}]]" if bare else f"[[{weight:g}:{text}]]"
        parts.append(text)
    return "".join(parts)


def escaped(text: str) -> str:
    """The text with what could be read as a sign marked as its own.

    A bracket or tilde next to its like, or at an end of the text, gets a backslash in front; backslashes that stand
    before one, or at the end, are doubled. So an odd number of backslashes before a sign always means the data's.
    Control characters become their pictures (U+2400 and on), so that neither a terminal nor git takes them for orders.

    >>> escaped("[[x]] a[1] ~"), escaped(r"\\[x")
    ('\\\\[\\\\[x\\\\]\\\\] a[1] \\\\~', '\\\\\\\\[x')
    >>> escaped("a\\x1b[31m\\n")
    'a␛[31m\\n'
    """

    def marked(match: re.Match[str]) -> str:
        if match[3]:
            return match[3] * 2
        start, end = match.start(2), match.end(2)
        around = text[max(start - 1, 0) : start] + text[end : end + 1]
        at_edge = start == 0 or end == len(text)
        return match[1] * 2 + ("\\" if at_edge or match[2] in around else "") + match[2]

    return _BEFORE_SIGNS.sub(marked, text).translate(_PICTURES)
