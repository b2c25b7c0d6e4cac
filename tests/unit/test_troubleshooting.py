"""docs/troubleshooting.md quotes messages that the program prints, and each refusal says what to do next."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Their callers add the advice: `read_bridge`, and the loader of training checkpoints.
ADVISED_BY_CALLERS = {"bridge/store.py", "bridge/ps_bank.py", "checkpoint/pending_rollouts.py"}
ADVICE = re.compile(r"; |: (set|use|name|save|copy|hide|pip) | must | needs [a-z_.]+=|correct it|see --help")
# These parts of a message contain the advice.
WITH_ADVICE = re.compile(
    r"\{(cure|advice|several|explain_\w+\(error\)|disk_advice\(cause\))\}"
    r"|\{where\}: \{error\}|\{(column|key!r)\} \{error\}|rollout\.server\.addresses: \{error\}"
)


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


def refusals():
    """Yield (place, text) of each UserError in the package that is written out, as in the source, with its advice."""
    for path in sorted((ROOT / "megatron_oprd").rglob("*.py")):
        name = str(path.relative_to(ROOT / "megatron_oprd"))
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", "") != "UserError" or name in ADVISED_BY_CALLERS:
                continue
            if isinstance(call.args[0], ast.Constant | ast.JoinedStr):
                yield f"{name}:{call.lineno}", "; ".join(map(ast.unparse, call.args))


def test_each_refusal_says_what_to_do_next():
    found = dict(refusals())
    assert len(found) > 100
    assert {place: text for place, text in found.items() if not (ADVICE.search(text) or WITH_ADVICE.search(text))} == {}
