"""python -m memrewrite bench: memory, time and loss of ways to train, including other libraries.

A configuration is a name made of parts (`configurations`). It is built into a training step
(`run.subject`, `run.optimizers`), and measured in a separate process (`run.worker`, `run.meters`).
The parent (`run.cost`, `run.quality`) interleaves the processes and stores their answers
(`document`), which `show` reads.
"""
