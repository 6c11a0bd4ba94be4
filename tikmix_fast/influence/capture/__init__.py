"""Views in place of a model's parameters, and the rule of every operation that they meet."""
