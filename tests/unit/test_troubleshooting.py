"""Each message that docs/troubleshooting.md quotes is one that the program prints."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def literals():
    """Return the text of the package; strings that follow each other are joined, and so are braces written twice."""
    texts = (path.read_text() for path in sorted((ROOT / "megatron_oprd").rglob("*.py")))
    return "\n".join(re.sub(r'"\s*\n\s*f?"', "", text) for text in texts).replace("{{", "{").replace("}}", "}")


def quoted_messages():
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    return rows


def test_each_quoted_message_is_in_the_source():
    source = literals()
    for message in quoted_messages():
        pieces = (re.escape(piece) for piece in message.split("..."))
        pattern = r"[^\n]*?".join(pieces)
        assert re.search(pattern, source), message
