"""Write docs/api.md, the reference of the Python library, from its signatures and docstrings.

    python docs/reference.py            writes it
    python docs/reference.py --check    fails where it is not current

Only the sources are read: nothing is imported.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).with_name("api.md")
MODULES = {
    "Models and images": ("flow.flow_map", "generate", "starts", "editing", "io.loading", "io.checkpoint", "io.box"),
    "Paths, times and samplers": ("flow.path", "flow.parameterization", "times", "sampler", "solvers", "rng"),
    "Training": (
        *("training.trainer", "training.recipe", "training.objectives", "training.trajectory", "training.targets"),
        *("training.weights", "training.distances", "training.average", "training.augment", "training.presets.shape"),
    ),
    "Data": ("io.data", "io.images"),
    "Judging": (
        *("evaluation.metrics", "evaluation.features", "evaluation.statistics", "evaluation.similarity"),
        *("evaluation.ode_error", "evaluation.search", "evaluation.judging"),
    ),
    "Networks": ("networks.configs", "networks"),
    "Errors": ("errors",),
}


def source_of(module: str) -> Path:
    """The file of a module."""
    path = ROOT / "cmtool" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public() -> dict[str, str]:
    """The names that `import cmtool` offers, and the modules they come from."""
    tree = ast.parse((ROOT / "cmtool" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "_PUBLIC":
            return ast.literal_eval(node.value)
    raise SystemExit("cmtool/__init__.py has no _PUBLIC")


def signature(node: ast.FunctionDef, *, method: bool = False) -> str:
    """As it is called; a long one on several lines."""
    arguments = node.args
    if method:
        arguments = ast.parse(f"def f({ast.unparse(arguments)}): ...").body[0].args  # type: ignore[attr-defined]
        (arguments.posonlyargs or arguments.args)[:1] = []
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"{node.name}({ast.unparse(arguments)}){returns}"
    if len(whole) <= 100:
        return whole
    given = ast.unparse(arguments)
    parts, depth, last = [], 0, 0
    for index, letter in enumerate(given):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(given[last:index].strip())
            last = index + 1
    parts.append(given[last:].strip())
    return f"{node.name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def text_of(node: ast.AST) -> str:
    """A docstring as Markdown: its indented parts stand as they are."""
    found = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    out, quoted = [], False
    for line in found.splitlines():
        inside = line.startswith("    ") or (quoted and not line)
        heads = line in ("Args:", "Returns:", "Raises:", "Yields:")
        if heads:
            out += ["", f"**{line[:-1]}**", ""]
            continue
        if inside and line:
            entry = line.strip()
            more = line.startswith("        ")
            out.append(f"  {entry}" if more else f"- {entry}")
            quoted = True
            continue
        quoted = quoted and not line
        out.append(line)
    text = "\n".join(out).strip()
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def entry(node: ast.AST, level: int, own: str = "") -> list[str]:
    """A class or function."""
    mark = "#" * level
    if isinstance(node, ast.FunctionDef):
        decorators = {ast.unparse(one) for one in node.decorator_list}
        if "property" in decorators:
            returns = f": {ast.unparse(node.returns)}" if node.returns else ""
            return [f"{mark} `{own}{node.name}{returns}`", "", text_of(node), ""]
        static = bool(decorators & {"staticmethod"}) or not own
        return [
            f"{mark} `{own}{node.name}`",
            "",
            "```python",
            signature(node, method=not static),
            "```",
            "",
            text_of(node),
            "",
        ]
    assert isinstance(node, ast.ClassDef)
    bases = [ast.unparse(base) for base in node.bases]
    fields = [
        f"{ast.unparse(item.target)}: {ast.unparse(item.annotation)}"
        + (f" = {ast.unparse(item.value)}" if item.value else "")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and not ast.unparse(item.target).startswith("_")
    ]
    lines = [f"{mark} `class {node.name}" + (f"({', '.join(bases)})" if bases else "") + "`", ""]
    if fields:
        lines += ["```python", *fields, "```", ""]
    lines += [text_of(node), ""]
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item):
            lines += entry(item, level + 1, f"{node.name}.")
    return lines


def reference() -> str:
    """The whole page."""
    names = public()
    lines = [
        "# The Python library",
        "",
        "Made by `python docs/reference.py` from the docstrings. `import cmtool` offers what is used most:",
        "",
        *(f"- `cmtool.{name}`, of `{module}`" for name, module in names.items()),
        "",
    ]
    for title, modules in MODULES.items():
        lines += [f"## {title}", ""]
        for module in modules:
            tree = ast.parse(source_of(module).read_text())
            lines += [f"### `cmtool.{module}`", "", text_of(tree), ""]
            for node in tree.body:
                known = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
                if known and ast.get_docstring(node):
                    lines += entry(node, 4)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write or check it."""
    made = reference()
    if sys.argv[1:] == ["--check"]:
        if not TARGET.exists() or TARGET.read_text() != made:
            raise SystemExit(f"{TARGET.name} is not current: run python docs/reference.py")
        return
    TARGET.write_text(made)
    print(f"{TARGET}: {len(made.splitlines())} lines")


if __name__ == "__main__":
    main()
