"""Training of the network by Algorithm 2, which can be interrupted and resumed.

Read `examples`, `draws`, `self_supervised`, `schedules`, `precision`, `validation`, `settings`,
`resuming`, `training`, `keeping`.
"""
