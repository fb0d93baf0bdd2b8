"""Where candidates are evaluated: in this process, or by workers on Ray."""
