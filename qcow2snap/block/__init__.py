"""Block nodes: one interface (node.py), the drivers behind it, and the graph that opens them."""
