"""One hypergradient by each peer, through its own documented interface.

Every maker returns a function without arguments that finds the hypergradient once, from the same
start, with the same loss and the same steps. What a peer lets one build once (a problem, an engine,
a decorated solver) is built once, outside the time taken. A peer is imported where it is used.
"""
