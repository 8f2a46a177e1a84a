"""Links code such as `llm_jax/model/positions.py:Alibi` in pages to its entry in the API reference."""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

CODE = re.compile(r"(llm_jax/[\w/]+)\.py:([\w.]+)")


class CodeLinks(SphinxTransform):
    """Replaces the literals by references; one without an entry, such as a private function, stays a literal."""

    default_priority = 5  # before references are resolved

    def apply(self) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            if match := CODE.fullmatch(literal.astext()):
                target = f"{match[1].replace('/', '.')}.{match[2]}"
                reference = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=target, refwarn=False)
                reference["refdoc"] = self.env.docname
                literal.replace_self(reference)
                reference += literal


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(CodeLinks)
    return {"parallel_read_safe": True}
