"""P, the approximate inverse curvature that turns task gradients into queries."""
