"""python -m memrewrite bench: what a way of training costs and what it keeps, rivals included.

A configuration is written as a name of parts (`configurations`), built into a training step
(`subject`, `optimizers`), and measured in a process of its own (`worker`, `meters`). The
parent (`cost`, `quality`) interleaves the processes and keeps what they say; `table`,
`chart`, `pareto` and `page` only read that.
"""
