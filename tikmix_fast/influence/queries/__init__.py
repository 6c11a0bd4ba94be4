"""Task gradients and the queries made from them: summed, preconditioned, projected, stored."""
