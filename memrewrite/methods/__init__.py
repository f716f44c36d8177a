"""The methods of `compile`, in the order in which they choose weights.

To add one: a file in this folder, and a line here.
"""

from __future__ import annotations

from memrewrite.methods.method import Method, method_of
from memrewrite.methods.projection import Projection
from memrewrite.methods.rounded import Rounded as Rounded
from memrewrite.methods.velora import SubTokens
from memrewrite.sites.options import GaLore, VeLoRA


def methods_for(
    velora: VeLoRA | None, galore: GaLore | None, activations: object = None, settled: bool = False
) -> list[Method]:
    """The methods that these options ask for.

    settled: for an estimate of a step between two refreshes of GaLore's projectors.
    """
    found: list[Method] = []
    if velora is not None:
        found.append(SubTokens(velora))
    if activations is not None:
        found.append(method_of(activations))
    if galore is not None and galore.gradients == "coordinates":
        found.append(Projection(galore, settled))
    return found
