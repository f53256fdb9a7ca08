"""Training of the network by Algorithm 2, which can be interrupted and resumed.

Read `precision`, `schedules`, `examples`, `draws`, `self_supervised`, `adaptation`, `validation`,
`settings`, `training`, `keeping`.
"""
