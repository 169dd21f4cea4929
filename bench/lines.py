"""Size of the five scripts: lines of code, docstrings, comments; tokens; the longest function bodies.

    python bench/lines.py

A line with a trailing comment counts half as code and half as comment. Tokens leave out comments, docstrings, newlines
and indentation, so they do not depend on the layout. A body leaves out the signature, the docstring, comments and blank
lines. Counted with Python 3.11: from 3.12 on, an f-string is many tokens, not one.
"""

import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("rollout.py", "train.py", "project.py", "select.py", "cropi.py")
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass
class Size:
    lines: int
    code: float  # lines of each kind
    docstrings: int
    comments: float
    tokens: int
    bodies: list[tuple[int, str]]  # lines of code of every function

    @property
    def share(self) -> float:
        """Of comments and docstrings in the lines that are not blank."""
        return (self.docstrings + self.comments) / (self.code + self.docstrings + self.comments)


def measure(source: str) -> Size:
    """The size of a script, from its text."""
    lines, docstring, functions = source.splitlines(), set(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and node.body:
            first = node.body[0]
            text = isinstance(first, ast.Expr) and getattr(first.value, "value", None)
            if isinstance(text, str):
                docstring |= set(range(first.lineno, first.end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            functions.append(node)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    alone = {number for number in commented if lines[number - 1].strip().startswith("#")}
    code = {number for number, line in enumerate(lines, 1) if line.strip()} - docstring - alone
    trailing = len(commented - alone)
    bodies = [(len(code & set(range(f.body[0].lineno, f.end_lineno + 1))), f.name) for f in functions]
    return Size(
        lines=len(lines),
        code=len(code) - trailing / 2,
        docstrings=len(docstring),
        comments=len(alone) + trailing / 2,
        tokens=sum(token.type not in LAYOUT and token.start[0] not in docstring for token in tokens),
        bodies=bodies,
    )


if __name__ == "__main__":
    sizes = {script: measure((ROOT / script).read_text()) for script in SCRIPTS}
    for script, size in sizes.items():
        print(
            f"{script:11} lines {size.lines:5} code {size.code:6.0f} docstrings {size.docstrings:4} "
            f"comments {size.comments:4.0f} share {size.share:.0%} tokens {size.tokens:6}"
        )
    longest = sorted(((n, f"{script}:{f}") for script, size in sizes.items() for n, f in size.bodies), reverse=True)
    print("longest bodies:", ", ".join(f"{n} {name}" for n, name in longest[:6]))
    fields = ("lines", "code", "docstrings", "comments", "tokens")
    total = Size(**{name: sum(getattr(size, name) for size in sizes.values()) for name in fields}, bodies=[])
    print(
        f"all: {total.lines} lines, code {total.code:.0f}, share of comments {total.share:.0%}, "
        f"tokens {total.tokens}, longest body {longest[0][0]}"
    )
