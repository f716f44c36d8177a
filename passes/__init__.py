"""The mathematics: passes over joint graphs, each a value, each in a file of its own.

base     what a pass is, and the graph verbs
ops      the IR ops: compress, reconstruct
find     weight gradients and the activations that feed them   (reads only)
velora   compress_saved_inputs                                 (approximate)
fold     fold_reconstruction                                   (exact)
lower    lower_ir_ops                                          (exact)
saved    what a forward keeps for its backward                 (reads only)
"""
