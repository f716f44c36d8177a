"""The mathematics: passes over graphs, each a value, each in a file of its own.

base     what a pass is, and the graph verbs
ops      the IR ops: compress and reconstruct, project and project back
find     weight gradients and the activations that feed them   (reads only)
velora   compress_saved_inputs                                 (approximate)
fold     fold_reconstruction                                   (exact)
lower    lower_ir_ops                                          (exact)
galore   project_updates                                       (approximate)
adam     hyperparameters_as_inputs, lower_fused_adam           (exact)
accumulate  accumulate_in_place                               (exact)
pieces   cut: an update as scalars, body and writes            (exact)
saved    what a forward keeps for its backward                 (reads only)
"""
