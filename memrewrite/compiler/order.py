"""The order of the passes over a joint graph, which only this file knows."""

from __future__ import annotations

from memrewrite.compiler.sizes import hint
from memrewrite.methods.method import Context
from memrewrite.methods.request import Request
from passes.base import Pass
from passes.emit import Decompositions
from passes.joint.absent import skip_absent_gradients
from passes.joint.tied import add_rows_in_place
from passes.lower import lower_ir_ops


def passes_for(request: Request, decompositions: Decompositions) -> list[Pass]:
    """Each method's passes, the lowering of their IR ops, and the exact passes for all graphs.

    Rows are added last: the methods' passes know sums, and no scatters into them.
    """
    context = Context(frozenset(request.weights), decompositions)
    found = [one for task in request.tasks for one in task.method.passes(task, context)]
    found += [lower_ir_ops()] if found else []
    found += [skip_absent_gradients(hint)] if request.may_be_absent else []
    return [*found, add_rows_in_place()]
