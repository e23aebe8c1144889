"""An extension of Griffe that shows the arguments in a docstring as a list on the site.

A docstring of this project names an argument at the start of a sentence, in lower case, and says
after a colon what it is: "momentum: lambda, a number or a Schedule. window: K." Each becomes an
item. What follows about errors and sources becomes a paragraph of its own. Indented paragraphs,
which are code and tables, stay as they are.
"""

import re

import griffe

ARGUMENT = re.compile(r"(?:(?<=^)|(?<=[.)] ))((?:[a-z]\w*(?:, )?)+(?: [A-Z]\w*)?): ")
OTHERS = re.compile(
    r"(?<=[.)] )(?=(?:Sources?|Idea|Other arguments|Raises|Returns)\b|[A-Z]\w*Error (?:if|for)\b)"
)
CODE = re.compile(r"^(?: |[-*] |\d\. |\|)", re.MULTILINE)


def paragraph(text: str) -> str:
    """Return a paragraph with its arguments, if it has any, as a list of Markdown."""
    text = " ".join(text.split())
    before, *parts = ARGUMENT.split(text)
    if not parts:
        return text
    last, *others = OTHERS.split(parts[-1])
    pairs = zip(parts[::2], [*parts[1:-1:2], last], strict=True)
    items = [f"- **{names}**: {said.strip()}" for names, said in pairs]
    return "\n\n".join(filter(None, [before.strip(), "\n".join(items), "".join(others)]))


def with_lists(docstring: str) -> str:
    """Return a docstring in which the arguments of each paragraph of text are a list."""
    parts = docstring.split("\n\n")
    return "\n\n".join(part if CODE.search(part) else paragraph(part) for part in parts)


class Arguments(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = with_lists(obj.docstring.value)
