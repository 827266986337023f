"""The plan: everything about an output that does not depend on the values of weights."""
