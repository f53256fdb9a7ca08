"""The network: a dynamics whose control is its weights, and the files these are kept in.

Read `architecture`, `layers`, `modules`, `wavelet_phases`, `scan`, `certificate`, `reconstruction`,
`weights`; then `held_out`, how a slice is checked, and `checked`, the one call for a slice;
`exported`, a network as one module.
"""
