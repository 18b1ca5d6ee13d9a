"""Graph to graph: finding attention, normalising it, choosing its kernel."""
