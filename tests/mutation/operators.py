"""What is changed in a source file: operators of cosmic-ray, and three of the same kind that numerical code needs.

Every operator changes one place. Annotations are left alone: nothing reads them when the code runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any, NamedTuple

import parso
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

# One replacement an operator: a product that becomes a quotient is noticed by whatever notices a sum in its place.
_BINARY = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul "
    "BitAnd_BitOr BitOr_BitAnd BitXor_BitAnd RShift_LShift LShift_RShift"
)
_COMPARISON = "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
_UNARY = "Delete_USub Delete_Not Delete_Invert"
_OTHERS = (
    "AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue "
    "ReplaceContinueWithBreak NumberReplacer RemoveDecorator ZeroIterationForLoop"
)

_TWINS = {
    "amax": "amin",
    "amin": "amax",
    "argmax": "argmin",
    "argmin": "argmax",
    "ceil": "floor",
    "cummax": "cummin",
    "floor": "ceil",
    "max": "min",
    "maximum": "minimum",
    "mean": "sum",
    "min": "max",
    "minimum": "maximum",
    "ones_like": "zeros_like",
    "square": "abs",
    "tril": "triu",
    "tril_": "triu_",
    "triu": "tril",
    "zeros": "ones",
    "zeros_like": "ones_like",
}


class ReplaceTwin(Operator):
    """A function by the one it is mixed up with: a maximum by a minimum, a mean by a sum, a square by a magnitude."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        following = node.get_next_leaf() if node.type == "name" else None
        if following is not None and following.value == "(" and node.value in _TWINS:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = _TWINS[node.value]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropKeywordArgument(Operator):
    """A call without one of its keyword arguments: what was passed on is forgotten.

    Not without ``device``: tests run on the one that is the default. Nor without ``strict``, a check of ``zip`` that
    never fails in correct code.
    """

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        named = node.type == "argument" and node.children[1] == "=" and node.parent.type in ("arglist", "trailer")
        if named and node.children[0].value not in ("device", "strict"):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        # An empty dictionary in its place: no commas have to move.
        return parso.python.tree.Name("**{}", node.start_pos, prefix=node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropStatement(Operator):
    """A call whose value nobody reads, or an assignment with an operator, does not happen."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type != "simple_stmt":
            return
        statement = node.children[0]
        augmented = statement.type == "expr_stmt" and statement.children[1].type == "augassign"
        called = statement.type in ("atom_expr", "power") and statement.children[-1].children[0] == "("
        if augmented or called:
            yield statement.start_pos, statement.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        first = node.children[0]
        node.children[0] = parso.python.tree.Name("pass", first.start_pos, prefix=first.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class Mutant(NamedTuple):
    """A source with one change.

    Attributes:
        line: of the change, counted from one.
        was, now: the lines that differ, without their indentation.
        code: the whole source.
    """

    line: int
    was: str
    now: str
    code: str


def _operators() -> Iterator[Operator]:
    for prefix, names in (
        ("core/ReplaceBinaryOperator_", _BINARY),
        ("core/ReplaceComparisonOperator_", _COMPARISON),
        ("core/ReplaceUnaryOperator_", _UNARY),
        ("core/", _OTHERS),
    ):
        for name in names.split():
            yield get_operator(prefix + name)()
    yield from (ReplaceTwin(), DropKeywordArgument(), DropStatement())


def _difference(before: str, after: str) -> tuple[int, str, str]:
    old, new = before.splitlines(), after.splitlines()
    first = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    last = next(i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b)
    was, now = old[first : len(old) - last], new[first : len(new) - last]
    return first + 1, " ".join(line.strip() for line in was), " ".join(line.strip() for line in now)


def mutants_of(code: str) -> list[Mutant]:
    """Every mutant of a source file that parses and means something else, in the order of its lines."""
    tree = ast.dump(_without_annotations(code))
    found: dict[str, Mutant] = {}
    for operator in _operators():
        for occurrence in range(len(code)):
            mutated = mutate_code(code, operator, occurrence)
            if mutated is None:
                break
            try:
                changed = ast.dump(_without_annotations(mutated))
            except SyntaxError:  # such as ``*`` in place of the ``/`` of a signature
                continue
            lenient = mutated.replace("strict=True", "strict=False") == code.replace("strict=True", "strict=False")
            if changed != tree and not lenient and _positional(mutated) == _positional(code):
                found.setdefault(changed, Mutant(*_difference(code, mutated), mutated))
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.now))


def _positional(code: str) -> int:
    """How many arguments of functions are positional alone: ``/`` in place of the ``*`` of a signature is no fault."""
    return sum(len(node.posonlyargs) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.arguments))


class _Negations(ast.NodeTransformer):
    """``not (a is b)`` as ``a is not b`` and ``not not a`` as ``a``, so that equal mutants are one."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        inner = node.operand
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.UnaryOp) and isinstance(inner.op, ast.Not):
            return inner.operand
        opposite = {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn}
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.Compare) and type(inner.ops[0]) in opposite:
            return ast.Compare(inner.left, [opposite[type(inner.ops[0])]()], inner.comparators)
        return node


def _without_annotations(code: str) -> ast.AST:
    tree = _Negations().visit(ast.parse(code))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return tree
