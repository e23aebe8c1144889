"""A hook of mkdocs that makes links from docs/ to other files of the repository work on the site.

A file that a page links to, such as ../examples/my-task.yaml, is put on the site under
`repository/`; for a Markdown file, so are the files beside it.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")  # the path in [text](../path)


def on_files(files: Files, config) -> Files:
    for page in list(files.documentation_pages()):
        for name in OUTSIDE.findall(page.content_string):
            linked = ROOT / name
            beside = linked.parent.iterdir() if linked.suffix == ".md" else ()
            for path in [linked, *beside]:
                put = f"repository/{path.relative_to(ROOT)}"
                if path.is_file() and files.get_file_from_path(put) is None:
                    files.append(File.generated(config, put, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    return OUTSIDE.sub(r"repository/\1", markdown)
