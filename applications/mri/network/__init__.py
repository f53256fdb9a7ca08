"""The network: a dynamics whose control is its weights, and the files these are kept in.

Read `architecture`, `layers`, `modules`, `scan`, `reconstruction`, `weights`.
"""
