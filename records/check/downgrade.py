# ruff: noqa: ARG002  (libcst hands every node twice)
"""Rewrites newer Python to what every supported interpreter parses, line by line the same: `python downgrade.py < new > old`.

A checker's findings must not depend on its interpreter. What stands in newer syntax (f-strings of 3.12, type parameters,
`except*`, starred subscripts) is read by libcst and written plainly: an f-string as a call of its parts. Exit status 3
without libcst, 1 where it cannot read the text either. A process of its own: libcst's parser has no bound on nesting, and
no text may end the checker.
"""

from __future__ import annotations

import sys

try:
    import libcst as cst
except ImportError:
    sys.exit(3)


class Plain(cst.CSTTransformer):
    """One node of newer syntax at a time, the innermost first; lines are kept."""

    def __init__(self, module: cst.Module) -> None:
        self.module = module
        self.joined = [0]  # depth of implicit concatenation, one count an expression inside an f-string

    def _code(self, node: cst.CSTNode) -> str:
        return self.module.code_for_node(node)

    def _parts(self, node: cst.CSTNode) -> list[str]:
        """Source of the constants and expressions of a string."""
        if isinstance(node, cst.ConcatenatedString):
            return self._parts(node.left) + self._parts(node.right)
        return self._pieces(node.parts) if isinstance(node, cst.FormattedString) else [self._code(node)]

    def _pieces(self, pieces) -> list[str]:
        found = []
        for piece in pieces:
            if isinstance(piece, cst.FormattedStringExpression):
                found += [f"({self._code(piece.expression)})", *self._pieces(piece.format_spec or ())]
            else:
                found.append(repr(piece.value))
        return found

    def _call(self, original: cst.CSTNode, updated: cst.CSTNode) -> cst.BaseExpression:
        """`_f(part, part)`, as many lines high as what it replaces."""
        parts = self._parts(updated)
        missing = self._code(original).count("\n") - sum(part.count("\n") for part in parts)
        return cst.parse_expression("_f(" + ",".join(parts) + "\n" * max(0, missing) + ")")

    def leave_FormattedString(self, original, updated):
        return updated if self.joined[-1] else self._call(original, updated)

    def visit_FormattedStringExpression(self, node) -> None:
        self.joined.append(0)

    def leave_FormattedStringExpression(self, original, updated):
        self.joined.pop()
        return updated

    def visit_ConcatenatedString(self, node) -> None:
        self.joined[-1] += 1

    def leave_ConcatenatedString(self, original, updated):
        self.joined[-1] -= 1
        whole = not self.joined[-1] and cst.FormattedString in _kinds(updated)
        return self._call(original, updated) if whole else updated

    def leave_FunctionDef(self, original, updated):
        return updated.with_changes(type_parameters=None)

    def leave_ClassDef(self, original, updated):
        return updated.with_changes(type_parameters=None)

    def leave_TypeAlias(self, original, updated):
        return cst.Assign([cst.AssignTarget(updated.name)], updated.value)

    def leave_TryStar(self, original, updated):
        shared = ("body", "type", "name", "leading_lines")
        handlers = [cst.ExceptHandler(**{f: getattr(h, f) for f in shared}) for h in updated.handlers]
        parts = {f: getattr(updated, f) for f in ("body", "orelse", "finalbody", "leading_lines")}
        return cst.Try(handlers=handlers, **parts)

    def leave_Index(self, original, updated):
        return updated.with_changes(star=None)

    def leave_Param(self, original, updated):
        return updated.with_changes(annotation=None) if updated.star == "*" else updated


def _kinds(node: cst.CSTNode) -> set[type]:
    """Kinds of the strings that stand side by side."""
    if isinstance(node, cst.ConcatenatedString):
        return _kinds(node.left) | _kinds(node.right)
    return {type(node)}


if __name__ == "__main__":
    try:
        tree = cst.parse_module(sys.stdin.buffer.read())
        text = tree.visit(Plain(tree)).code
    except (cst.ParserSyntaxError, ValueError, RecursionError):
        sys.exit(1)
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))
