"""Passes and analyses over FX graphs: one idea a file, each checked against a reference by tests.

base         what a pass is, and the graph functions that all passes use
ops          the IR ops: compress, reconstruct, project, project_back, hold, attach, add_present
emit         trace a function of tensors into a graph
provenance   the module and the line of code that a node comes from           (reads only)

joint/: the graph of a forward and its backward, before it is partitioned
find         weight gradients and the activations that they read              (reads only)
velora       compress_saved_inputs                                            (approximate)
compress     compress_activations[method]                                     (approximate)
fold         fold_reconstruction                                              (exact)
port         return_coordinates                                               (exact)
push         return_projections                                               (approximate)
             push_projections                                                 (exact)
attach       detach_ports, which the passes on ports end with                 (exact)
lower        lower_ir_ops; also of update graphs, so it lies one folder up    (exact)
absent       skip_absent_gradients; write_in_place, after the partitioning    (exact)
tied         add_rows_in_place                                                (exact)

split/: the forward graph and the backward graph
saved        what a forward saves for its backward, and who reads it          (reads only)
recompute    which saved matmul outputs to recompute                          (reads only)
sums         keep_sums                                                        (exact)
late         recompute_late                                                   (exact)
live         which buffers are live when                                      (reads only)

update/: the step of an optimizer on one weight
adam         hyperparameters_as_inputs, lower_fused_adam                      (exact)
galore       project_updates                                                  (approximate)
factor       factor_updates                                                   (exact)
store        store_moments                                                    (approximate)
accumulate   accumulate_in_place                                              (exact)
pieces       cut: scalar arithmetic, compiled body, writes into the weight    (exact)
"""
