"""The embedded demonstration: from nothing to a model that reads, with a report."""
