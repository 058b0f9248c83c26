"""Settings of the documentation site, built by `make docs`."""

import contextlib
import importlib.util
import io
import os
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.roles import XRefRole
from sphinx.writers.html5 import HTML5Translator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))

import edm2  # noqa: E402
from edm2.cli import main  # noqa: E402

project = "edm2"
author = "the edm2 contributors"
copyright = author
release = version = edm2.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = False

# Docstrings: Google style; names in single backticks become links where the object is documented, else code.
default_role = "mention"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
autodoc_default_options = {"members": True}
# The callbacks are documented whether or not the libraries they belong to are installed.
autodoc_mock_imports = [
    name
    for name in ("transformers", "lightning", "huggingface_hub")
    if importlib.util.find_spec(name) is None
]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"edm2 {release}"
html_show_copyright = False
html_static_path: list[str] = ["_static"]
html_css_files = ["edm2.css"]
html_copy_source = False


class CommandHelp(Directive):
    """The help of `edm2 WORDS`, as the command prints it."""

    required_arguments = 0
    optional_arguments = 8

    def run(self) -> list[nodes.Node]:
        """One literal block."""
        text = io.StringIO()
        os.environ.update(COLUMNS="82", NO_COLOR="1")
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*self.arguments, "--help"])
        return [nodes.literal_block(text.getvalue(), text.getvalue().rstrip(), language="none")]


class Mention(XRefRole):
    """Text in single backticks: a link for a public name, code for everything else."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """A cross-reference only where the name says what it is: short names are those of many attributes."""
        if re.fullmatch(r"edm2(\.\w+)+|[A-Z]\w+", self.text):
            self.refdomain, self.reftype = "py", "obj"
            self.classes = ["xref", "py", "py-obj"]
            return self.create_xref_node()
        return [nodes.literal(self.rawtext, self.text)], []


def write_math(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Formulas as MathML, which browsers show by themselves, also offline."""
    formula = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    writer.body.append(f"<p>{formula}</p>" if isinstance(node, nodes.math_block) else formula)
    raise nodes.SkipNode


def show_signature(
    app: Sphinx, kind: str, name: str, thing: object, options: object, signature: str, result: str
) -> object:
    """Functions as defaults of dataclasses by their names, and types without what files and options check of them."""
    if signature is None:
        return None
    if "<built-in method" in signature:
        signature = re.sub(r"<built-in method (\w+) of type object[^>]*>", r"\1", signature)
        signature = re.sub(r"~(?:\w+\.)+", "", signature)
    signature = re.sub(r"~(?:\w+\.)+(Annotated|Range|Suppress)\b", r"\1", signature)
    checks = r"(?:Range\([^()]*\)|Suppress)"
    return re.sub(rf"Annotated\[((?:[^\[\]]|\[[^\[\]]*\])*?)(?:, {checks})+\]", r"\1", signature), result


def setup(app: Sphinx) -> None:
    """Register the role of single backticks, the directive for help texts, and formulas."""
    app.connect("autodoc-process-signature", show_signature)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))  # type: ignore[arg-type]
    app.add_role("mention", Mention())
    app.add_directive("command-help", CommandHelp)
