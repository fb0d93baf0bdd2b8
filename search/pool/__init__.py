"""Where candidates are evaluated: in this process, or by workers on Ray.

A `Pool` has jobs done and says who is to blame for faults. Its `Workers` are what the driver knows
of them. A `Worker` is what a worker's process holds.
"""
