"""The documentation site: Sphinx, Markdown by MyST, notebooks as they are committed. `make docs` builds it strictly.

Nothing is fetched while building (no intersphinx) or reading (fonts and scripts are part of the site). Missing pages,
files, anchors, and references to names of this package are warnings, which `make docs` takes for errors.
"""

import re

import flax.nnx
from sphinx.util import inspect

import polaformer_jax

project = "polaformer_jax"
copyright = "the authors of polaformer_jax, MIT licence"
version = release = polaformer_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
nitpicky = True
# In docstrings, `name` in single backquotes is code, and a link where it is documented.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:.*", r"(?!polaformer_jax\b).*"),  # names of other packages are not looked up
    # Types that signatures name, of objects that a user hands on as they are.
    (
        "py:class",
        r"polaformer_jax\..*\.(Block|PPBlock|ResidualBlock|Conversion|Durations|Keys|Passes|Prepared|ProgramCache|States)",
    ),
    ("py:class", "polaformer_jax.data.workers.Stream"),
]

nb_execution_mode = "off"  # `make notebooks` executes them
nb_ipywidgets_js = {}  # no notebook has widgets; their scripts would come from another host
myst_heading_anchors = 4
myst_enable_extensions = []

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = f"polaformer_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has the search already
    "footer_content_items": ["copyright"],
}
html_context = {"default_mode": "auto"}


def module_signature(app, what, name, obj, options, signature, returns) -> tuple[str, None] | None:
    """Of a Flax module, the arguments of its own `__init__`: those of its metaclass are `*args, **kwargs`."""
    if what != "class" or not issubclass(obj, flax.nnx.Module):
        return None
    found = inspect.signature(obj.__init__, bound_method=True)
    text = inspect.stringify_signature(found, show_return_annotation=False, unqualified_typehints=True)
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text), None


def skip_member(app, what, name, obj, skip, options) -> bool | None:
    """The fields of named tuples, which the docstring of their class explains."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def drop_false_backlinks(app, pagename, templatename, context, doctree) -> None:
    """Pages of source code link back to one module's names, but some objects are documented by a shorter name."""
    if not pagename.startswith("_modules/"):
        return
    documented = app.env.get_domain("py").objects
    link = r'<a class="viewcode-back" href="[^"#]*#([^"]*)">.*?</a>'
    context["body"] = re.sub(link, lambda match: match[0] if match[1] in documented else "", context["body"])


def setup(app) -> None:
    app.connect("html-page-context", drop_false_backlinks)
    app.connect("autodoc-process-signature", module_signature)
    app.connect("autodoc-skip-member", skip_member)
