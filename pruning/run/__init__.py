"""From a pruning request to a checked folder: request, plan, work folder, save, verify."""
