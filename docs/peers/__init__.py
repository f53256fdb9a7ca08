"""The programs of the page "Coming from": each prints its hypergradient of one problem.

`python -m docs.peers.with_higher` and so on, where that library is installed.
"""
