"""A hook of mkdocs that makes the pages of docs/ work on the site as they do in the repository.

Links to other files of the repository: a file that a page links to, such as
../examples/my-task.yaml, is put on the site under `repository/`; for a Markdown file, so are the
files beside it.

Formulas with angles, such as <dL/dx, z>: a browser would take them for tags of HTML and hide them,
on the pages and in docstrings. The site has no HTML of its own, so angles are text.
"""

import re
from pathlib import Path

from markdown import Extension, Markdown

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")  # the path in [text](../path)
COMMENT = re.compile(r"^<!-- .* -->\n", re.MULTILINE)  # the places of tables


class TextAngles(Extension):
    """Markdown without HTML: every < is text."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")


def on_config(config):
    config.markdown_extensions.append(TextAngles())
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for page in list(files.documentation_pages()):
        for name in OUTSIDE.findall(page.content_string):
            linked = ROOT / name
            beside = linked.parent.iterdir() if linked.suffix == ".md" else ()
            for path in [linked, *beside]:
                put = f"repository/{path.relative_to(ROOT)}"
                if path.is_file() and files.get_file_from_path(put) is None:
                    files.append(File.generated(config, put, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    return OUTSIDE.sub(r"repository/\1", COMMENT.sub("", markdown))
