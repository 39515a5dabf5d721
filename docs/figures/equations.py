"""How docstrings become pages: paragraphs of equations stay as they are written, and no asterisk makes bold."""

import re

import griffe


class Equations(griffe.Extension):
    """Changes docstrings before they are read as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for every module, class, function and attribute.

        Args:
            obj: what may have a docstring.
        """
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """The docstring with its equations as blocks of code, and other asterisks escaped.

    Args:
        docstring: without the indentation of its code.
    """
    paragraphs = docstring.split("\n\n")
    fenced = [False]
    for paragraph in paragraphs:
        fenced.append(fenced[-1] ^ (paragraph.count("```") % 2 == 1))
    return "\n\n".join(
        text if inside or "```" in text else _block(text) if _is_equations(text) else _escaped(text)
        for text, inside in zip(paragraphs, fenced, strict=False)
    )


def _is_equations(paragraph: str) -> bool:
    lines = paragraph.split("\n")
    return all(" = " in line and not line.startswith((" ", "-")) and not line.endswith((".", ":")) for line in lines)


def _block(equations: str) -> str:
    return f"```text\n{equations}\n```"


def _escaped(paragraph: str) -> str:
    """Asterisks between backticks and at the start of a line, as of `*args`, are left alone."""
    parts = re.split(r"(`[^`]*`)", paragraph)
    return "".join(
        part if part.startswith("`") else re.sub(r"(?<=\S)\*\*|(?<=\s)\*(?=\s)", _escape, part) for part in parts
    )


def _escape(match: re.Match[str]) -> str:
    return match[0].replace("*", "\\*")
